#vm kernels=newest,6.12 limit=30 short=newest,6.12
# doctor finds ublk and the kernel's NBD where they are, and says what is missing where they are not.
set -euxo pipefail

says() { ploopctl doctor | grep -E "^$1 +$2 "; }

[ ! -e /dev/ublk-control ] && [ ! -e /dev/nbd0 ]
says missing ublk | grep 'the kernel has the module ublk_drv'
says missing kernel-nbd | grep 'the kernel has the module nbd'
modprobe -a ublk_drv nbd
says ok ublk
says ok kernel-nbd
# A machine of our own lacks nothing that a mount needs, and says so.
for name in fuse loop resend cap-sys-admin cap-sys-resource io-engine seccomp; do says ok $name; done
ploopctl -o json doctor | grep '"mount":true'
modprobe -r nbd
says missing kernel-nbd
modprobe -r ublk_drv
