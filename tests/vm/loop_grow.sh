#vm kernels=newest,6.12 limit=60 short=newest,6.12
# A mounted ext4 grows on a plain loop device: the machine can do what its host may not.
set -euxo pipefail

cd "$(mktemp -d)"
truncate -s 64M image
mkfs.ext4 -q image
mkdir mnt
device=$(losetup --find --show image)
mount "$device" mnt
head -c 20M /dev/urandom >mnt/file
sum=$(sha256sum <mnt/file)
truncate -s 256M image
losetup --set-capacity "$device"
resize2fs "$device"
[ "$(stat -f -c '%b * %S / 1048576' mnt | xargs expr)" -gt 200 ]
[ "$(sha256sum <mnt/file)" = "$sum" ]
umount mnt
e2fsck -fn "$device"
losetup --detach "$device"
rm -r "$PWD"
