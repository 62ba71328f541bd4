#vm kernels=newest,6.12 limit=300 short=newest
# Workers killed again and again under a writer cost a pause, never an I/O error, on a slow processor too.
# There they are often killed while the kernel hands them a request.
set -e
for n in 1 2 3; do
    "$PLOOP_SUITES/tools-mount" --exact dying_workers_are_a_pause_and_not_an_error
done
