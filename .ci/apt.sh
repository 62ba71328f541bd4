# Sourced by those who take packages from suites that this machine's apt is not configured with.
# Nothing that the machine's apt is configured with changes: sources and lists live in a folder of
# the caller's, and the sources are the machine's own with other suites named in them.

# The release that this machine runs: "bookworm", or nothing.
apt_release() { (. /etc/os-release && printf '%s\n' "${VERSION_CODENAME:-}"); }

# The stanzas (or lines) that carry the release itself, with its suite replaced.
apt_derived_sources() {
    local release=$1 suite=$2 own
    for own in /etc/apt/sources.list.d/*.sources; do
        [ -e "$own" ] || continue
        awk -v RS= -v ORS='\n\n' -v release="$release" -v suite="$suite" \
            '$0 ~ "(^|\n)Suites:([^\n]* )?" release "( |\n|$)" { sub(/Suites:[^\n]*/, "Suites: " suite); print }' "$own"
    done
}

apt_derived_list() {
    local release=$1 suite=$2
    [ ! -s /etc/apt/sources.list ] || awk -v release="$release" -v suite="$suite" \
        '$1 == "deb" && $0 ~ " " release " " { sub(" " release " ", " " suite " "); print }' /etc/apt/sources.list
}

# Sets apt_options so that apt sees this machine's own suites and the SUITEs, from FOLDER.
apt_with_suites() {
    local folder=$1 release suite
    shift
    release=$(apt_release)
    [ -n "$release" ] || { printf 'no release name in /etc/os-release\n' >&2; return 1; }
    rm -rf "$folder/sources"
    mkdir -p "$folder/sources" "$folder/lists/partial"
    cp /etc/apt/sources.list.d/*.sources "$folder/sources/" 2>/dev/null || true
    [ ! -s /etc/apt/sources.list ] || cp /etc/apt/sources.list "$folder/sources/own.list"
    for suite in "$@"; do
        apt_derived_sources "$release" "$suite" >"$folder/sources/ours-$suite.sources"
        apt_derived_list "$release" "$suite" >"$folder/sources/ours-$suite.list"
    done
    apt_options=(-o "Dir::Etc::SourceList=/dev/null" -o "Dir::Etc::SourceParts=$folder/sources"
        -o "Dir::State::Lists=$folder/lists" -o "APT::Sandbox::User=root")
}
