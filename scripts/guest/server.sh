# server.sh - what the guest tests share: options, a scratch folder, a server of CMD on the socket $S that is started,
# ended, and never left behind. To be sourced, with $0's name in messages; expects CMD once start_server is called.
# shellcheck shell=bash
NAME=$(basename "$0" .sh)
W=$(mktemp -d "${TMPDIR:-/tmp}/vdg.XXXXXX")
S=$W/s SERVER='' GUEST=''

die() { echo "$NAME: $*" >&2; exit 2; }

cleanup() {
    [ -z "$GUEST" ] || kill "$GUEST" 2>/dev/null
    [ -z "$SERVER" ] || kill -9 "$SERVER" 2>/dev/null
    rm -rf "$W"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

help() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0; }

# options 'OPTION=VARIABLE …' WORDS…: takes WORDS as options with values, and sets their variables. Other options go on to
# PASS with their values, where that is an array; else they are an error.
options() {
    local known=" $1 " variable
    shift
    while [ $# -gt 0 ]; do
        case $1 in -h | --help) help ;; esac
        [ $# -ge 2 ] || die "$1 wants a value"
        variable=${known#*" $1="}
        if [ "$variable" != "$known" ]; then
            printf -v "${variable%% *}" %s "$2"
        elif [[ $(declare -p PASS 2>/dev/null) == "declare -a"* ]]; then
            PASS+=("$1" "$2")
        else
            die "unknown option $1"
        fi
        shift 2
    done
}

start_server() {
    local i
    sh -c "exec ${CMD//@S/$S}" </dev/null >>"$W/server.out" 2>&1 &
    SERVER=$!
    for ((i = 0; i < 600; i++)); do
        # a name left by one that was killed is no socket anybody listens on
        grep -q " 00010000 .* $S\$" /proc/net/unix && return 0
        kill -0 "$SERVER" 2>/dev/null || break
        sleep .05
    done
    cat "$W/server.out" >&2
    die "the server did not come up"
}

kill_server() { # kill -9; fails if it had ended before
    local rc
    kill -9 "$SERVER" 2>/dev/null
    { wait "$SERVER"; } 2>/dev/null
    rc=$?
    SERVER=''
    [ $rc = 137 ]
}

stop_server() { # SIGTERM; fails unless it ends by that, and well
    local i rc
    kill "$SERVER" 2>/dev/null
    for ((i = 0; i < 200; i++)); do
        kill -0 "$SERVER" 2>/dev/null || break
        sleep .05
    done
    [ $i -lt 200 ] || { echo "FAIL: the server does not end on SIGTERM"; return 1; }
    wait "$SERVER"
    rc=$?
    SERVER=''
    [ $rc = 0 ] || [ $rc = 143 ] || { echo "FAIL: the server ended with status $rc"; return 1; }
}
