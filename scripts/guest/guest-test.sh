#!/bin/bash
# guest-test.sh - starts a vhost-user-blk server, boots one real guest on it, runs the tests of tests/ in
# that guest and ends by their result. Overwrites the disk.
#   guest-test.sh --server-cmd 'CMD with @S for the socket' [options]
# Options:
#   --queues N          virtqueues and CPUs of the guest (2)
#   --size BYTES        capacity that the guest must see
#   --tests 'A B …'     (boot-check fio-verify fs bench pattern)
#   --export-cmd CMD    after the server has ended, makes a raw image of the disk at @O; it is compared
#                       byte for byte with what pattern.sh did
#   --pattern-mb N      bytes at the start of the disk for pattern.sh (48)      --seed N  (1)
#   --env 'K=V …'       for the tests: RO, NO_DISCARD, VERIFY_MB, FS_MB, BENCH_MB, RT, JOBS
#   --timeout SEC       for the guest (180)
#   any other option with its value goes to run-guest.sh (--dev-opts, --accel, --machine, --queue-size, …)
# For QEMU's own daemon as server give --dev-opts config-wce=off, else its guest sees write through.
set -u
HERE=$(cd "$(dirname "$0")" && pwd)
CMD='' QUEUES=2 SIZE='' TESTS='boot-check fio-verify fs bench pattern' EXPORT='' PATTERN_MB=48 SEED=1 TESTENV=''
TMO=180 PASS=()

. "$HERE/server.sh"
options "--server-cmd=CMD --queues=QUEUES --size=SIZE --tests=TESTS --export-cmd=EXPORT --pattern-mb=PATTERN_MB \
    --seed=SEED --env=TESTENV --timeout=TMO" "$@"
[ -n "$CMD" ] || die "--server-cmd is missing"

make_script() {
    local t
    {
        for v in QUEUES SIZE SEED; do [ -z "${!v}" ] || echo "$v=${!v}"; done
        for v in $TESTENV; do echo "$v"; done
    } >"$W/env"
    {
        echo 'bad=0'
        echo 'seconds() { cut -d. -f1 /proc/uptime; }'
        for t in $TESTS; do
            cat <<E2
echo "=== $t"; t0=\$(seconds)
sh /files/$t.sh; rc=\$?
[ \$rc = 0 ] && echo "--- $t: ok (\$((\$(seconds) - t0)) s)" || { echo "--- $t: FAILED"; bad=1; }
E2
        done
        echo 'exit $bad'
    } >"$W/script"
}

run_tests() {
    local files=(--file "$W/env") t f
    for t in $TESTS; do
        [ -r "$HERE/tests/$t.sh" ] || die "no test $t"
        files+=(--file "$HERE/tests/$t.sh")
    done
    for f in "$HERE"/fio/*.fio; do files+=(--file "$f"); done
    case " $TESTS " in
    *" pattern "*)
        python3 "$HERE/model.py" plan "$SEED" $((PATTERN_MB << 20)) >"$W/plan"
        python3 "$HERE/model.py" data "$SEED" >"$W/data"
        files+=(--file "$W/plan" --file "$W/data")
        ;;
    esac
    make_script
    "$HERE/run-guest.sh" --socket "$S" --script "$W/script" --queues "$QUEUES" --smp "$QUEUES" \
        --timeout "$TMO" --stats "$W/stats" "${files[@]}" ${PASS[@]+"${PASS[@]}"} &
    GUEST=$!
    wait "$GUEST"
    local rc=$?
    GUEST=''
    return $rc
}

check_image() {
    case " $TESTS " in *" pattern "*) ;; *) return 0 ;; esac
    [ -n "$EXPORT" ] || return 0
    sh -c "${EXPORT//@O/$W/raw}" || { echo "FAIL: export"; return 1; }
    python3 "$HERE/model.py" check "$SEED" $((PATTERN_MB << 20)) "$W/raw"
}

start_server
bad=0
run_tests || bad=$?
[ ! -r "$W/stats" ] || cat "$W/stats"
stop_server || bad=1
if [ $bad = 0 ]; then
    check_image || bad=1
fi
if [ $bad != 0 ]; then
    echo "--- the server said (last lines):"
    tail -20 "$W/server.out"
fi
[ $bad = 0 ] && echo "guest-test: ok" || echo "guest-test: FAILED"
exit $bad
