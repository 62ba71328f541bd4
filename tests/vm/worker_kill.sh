#vm kernels=newest,6.12 limit=240 short=newest,6.12
# A disk made, mounted, written and its worker killed: every byte is found again, on each file system.
set -euo pipefail
PS4='+ $SECONDS s: '

# Real files and folders, not too many: the processor is emulated.
source=/usr/share/perl5/Dpkg
[ -d $source ] || source=/usr/share/doc/bash

cd "$(mktemp -d)"
mkdir mnt

worker() { ploopctl -o json list | sed -n 's/.*"worker_pid":\([0-9]*\).*/\1/p'; }

# Waits for a worker that is not the one given.
another_worker() {
    local n new
    for n in $(seq 300); do
        new=$(worker)
        [ -z "$new" ] || [ "$new" = "$1" ] || return 0
        sleep 0.1
    done
    echo "no other worker than $1" && return 1
}

check_file_system() {
    local device
    device=$(ploopctl mount disk)
    case $1 in
    ext4) e2fsck -fn "$device" ;;
    xfs) xfs_repair -n "$device" ;;
    btrfs) btrfs check --readonly "$device" ;;
    esac
    ploopctl umount disk
}

all_is_there() {
    diff -r "$source" mnt/tree
    dd if=mnt/unsynced bs=1M iflag=direct status=none | cmp - unsynced
}

survives() {
    local fs=$1 old
    modprobe "$fs"
    ploopctl init -s 400M --fs "$fs" disk
    ploopctl mount disk mnt
    cp -r "$source" mnt/tree
    sync -f mnt
    # Answered and not flushed: this lives in the keeper when the worker dies.
    head -c 4M /dev/urandom >unsynced
    dd if=unsynced of=mnt/unsynced bs=1M oflag=direct status=none
    old=$(worker)
    kill -9 "$old"
    sync -f mnt
    another_worker "$old"
    all_is_there
    ploopctl umount mnt
    ploopctl check disk
    check_file_system "$fs"
    ploopctl mount --read-only disk mnt
    all_is_there
    ploopctl umount mnt
    rm -r disk
}

set -x
[ "$(find $source -type f | wc -l)" -gt 5 ]
for fs in ext4 xfs btrfs; do survives $fs; done
[ -z "$(dmesg | grep -E 'I/O error|EXT4-fs error|Corruption|Shutting down filesystem')" ]
rm -r "$PWD"
