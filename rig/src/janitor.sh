# Removes everything that one test bed made. Runs as a process of its own that waits on a pipe from the owner:
# when the owner ends, however it ends, the pipe closes and the work begins. Also run by the sweep at start.
# $1 = id of the test bed, $2 = its run directory, $3 = its socket directory, $4 = the owner's pid
# A last line on the pipe can say «keep-logs» (leave the run directory's logs).
trap '' INT TERM HUP PIPE
id=$1 run_dir=$2 socket_dir=$3 owner=$4
mode=all
while read -r word; do mode=$word; done

namespaces() {
    for path in /run/netns/plover-"$id"-*; do
        [ -e "$path" ] && echo "${path##*/}"
    done
}

# Only our own processes live in namespaces that we made.
victims() {
    for namespace in $(namespaces); do
        for pid in $(ip netns pids "$namespace" 2>/dev/null); do
            [ "$pid" = "$owner" ] || [ "$pid" = $$ ] || echo "$pid"
        done
    done
}

round=0
dead=" "
while pids=$(victims) && [ -n "$pids" ] && [ $round -lt 100 ]; do
    for pid in $pids; do dead="$dead$pid "; done
    kill -KILL $pids 2>/dev/null
    round=$((round + 1))
    [ $round -gt 1 ] && sleep 0.02
done
# Daemons that were killed could not remove the file through which QEMU hands over device state; nor can those that a test
# killed before, whose process is gone.
for file in /dev/shm/plover-guest-*.state; do
    pid=${file#/dev/shm/plover-guest-}
    case $dead in *" ${pid%%-*} "*) rm -f "$file" ;; esac
    [ -e "/proc/${pid%%-*}" ] || rm -f "$file"
done
failed=0
[ -z "$pids" ] || { echo "janitor: processes of $id still live: "$pids; failed=1; }

# Deepest first, because mounts may lie inside one another. Blanks stand in /proc/mounts as \040.
while read -r _ point _; do
    point=$(printf '%b' "$point")
    case $point in "$run_dir"/*) printf '%s\n' "$point" ;; esac
done </proc/mounts | sort -r | while read -r point; do umount -l "$point"; done
if grep -qF "/rig-run/$id/" /proc/mounts; then echo "janitor: mounts of $id are left"; failed=1; fi

for namespace in $(namespaces); do ip netns del "$namespace"; done

case $run_dir in
*/rig-run/"$id")
    if [ "$mode" = keep-logs ]; then
        rm -rf "$run_dir"/*/data
    else
        rm -rf "$run_dir"
    fi ;;
esac
[ -z "$(namespaces)" ] || { echo "janitor: namespaces of $id are left: "$(namespaces); failed=1; }
# While this directory exists, the next run's sweep tries again.
[ $failed = 1 ] || rm -rf "$socket_dir"
exit $failed
