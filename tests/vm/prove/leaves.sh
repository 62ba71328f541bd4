#vm kernels=newest limit=20 verdict=failed
# A test that passes and leaves a loop device.
truncate -s 1M "$TMPDIR/image"
losetup --find "$TMPDIR/image"
