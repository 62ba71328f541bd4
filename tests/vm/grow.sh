#vm kernels=newest,6.12 limit=240 short=newest,6.12
# A mounted ext4 grows with its disk, which needs a capability that hosts for building lack.
set -euo pipefail
PS4='+ $SECONDS s: '
set -x

cd "$(mktemp -d)"
mkdir mnt
modprobe ext4
ploopctl init -s 200M --cluster 32K disk
ploopctl mount disk mnt
head -c 20M /dev/urandom >mnt/file
sum=$(sha256sum <mnt/file)
for size in 500M 800M 1200M; do
    ploopctl resize disk $size
    [ "$(stat -f -c '%b * %S / 1048576' mnt | xargs expr)" -gt $((${size%M} * 8 / 10)) ]
    [ "$(sha256sum <mnt/file)" = "$sum" ]
done
ploopctl umount mnt
ploopctl check disk
device=$(ploopctl mount disk)
e2fsck -fn "$device"
ploopctl umount disk
rm -r "$PWD"
