#vm kernels=newest,6.12 limit=900
# What the suites that talk to the kernel demand of FUSE, loop, mount and keepers.
# The skipped test counts what a fast processor writes in a moment.
export PLOOP_KEEPER_KILLS=5
status=0
for suite in fuse tools-mount tools-namespaces keeper_kills; do
    "$PLOOP_SUITES/$suite" --test-threads 2 --show-output \
        --skip a_stopped_server_can_be_followed_by_another_without_anybody_noticing || status=1
done
exit $status
