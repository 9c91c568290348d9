#!/bin/bash
# guest.sh TOOLS CONFIGURATION: every suite of conformance.sh, in the working directory. For a guest, as root.
#
# Each case is a line: "ok SUITE/NAME", "FAIL SUITE/NAME" or "skip SUITE/NAME"; what a case that is not "ok"
# has printed follows it, indented. The last line is "done".
set -u
tools=$1 configuration=$2
export NO_COLOR=1 HOME=/root
share=$PWD
log=/run/conformance.log
# How much is shown of what a case has printed.
shown=20

# case_of SUITE/NAME COMMAND...: in an empty directory. Codes 3 and 4 are stress-ng's for what it cannot test.
case_of() {
    local name=$1 status=0 result=ok dir=$share/${1//\//-}
    shift
    mkdir "$dir" && cd "$dir" || exit
    "$@" >"$log" 2>&1 </dev/null || status=$?
    cd "$share" || exit
    case $name:$status in
        *:0) ;;
        stress-ng/*:[34]) result=skip ;;
        *) result=FAIL ;;
    esac
    # What cannot be removed is a failure as well.
    rm -rf "$dir" || result=FAIL
    printf '%s %s\n' "$result" "$name"
    [ "$result" = ok ] || tail -n "$shown" "$log" | sed 's/^/    /'
}

# pjdfstest CONFIGURATION [PATTERN]: its cases, each on a line of its own.
pjdfstest() {
    "$tools/pjdfstest" -c "$@" -p "$share" -s /dev/shm >"$log" 2>&1 </dev/null
    sed -nE -e 's,^([a-z0-9_:]+) +ok$,ok pjdfstest/\1,p' -e 's,^([a-z0-9_:]+) +FAILED$,FAIL pjdfstest/\1,p' \
        -e 's,^([a-z0-9_:]+) +skipped$,skip pjdfstest/\1,p' "$log"
    grep -q '^Summary: ' "$log" || { echo "FAIL pjdfstest/end" && sed 's/^/    /' "$log"; }
}

stress() {
    stress-ng "--$1" 1 -t 2 --verify --temp-path .
}

fio_verify() {
    fio --name=verify --size=8M --verify=crc32c --directory=. --minimal "$@"
}

# Two writers and readers in the mode that has shared memory in a mapped file.
sqlite_wal() {
    local rows='with recursive c(x) as (select 1 union all select x+1 from c where x < 3000)'
    sqlite3 t.db 'pragma journal_mode=wal; create table t(a, b);' &&
        sqlite3 t.db "$rows insert into t select x, hex(randomblob(20)) from c;" || return
    local i j
    for i in 1 2; do
        for j in 1 2 3 4 5; do
            sqlite3 -cmd '.timeout 30000' t.db "insert into t values($i, $j); select count(*) from t;" ||
                touch failed
        done &
    done
    wait
    [ ! -e failed ] || return
    [ "$(sqlite3 t.db 'select count(*) from t; pragma integrity_check;')" = $'3010\nok' ]
}

git_history() {
    local i git=(git -c user.email=a@example.org -c user.name=a -c gc.autoDetach=false)
    export GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_SYSTEM=/dev/null
    "${git[@]}" init -q r && cd r && mkdir d || return
    for i in $(seq 150); do echo "$i" >"d/$i"; done
    "${git[@]}" add . && "${git[@]}" commit -qm one && "${git[@]}" checkout -qb two || return
    for i in $(seq 1 2 150); do echo more >>"d/$i"; done
    "${git[@]}" mv d/3 e && "${git[@]}" commit -qam two && "${git[@]}" checkout -q - &&
        [ -z "$("${git[@]}" status --porcelain)" ] && "${git[@]}" merge -q two &&
        "${git[@]}" gc -q && "${git[@]}" fsck --full && "${git[@]}" clone -q . ../copy &&
        diff -r d ../copy/d
}

make_test() {
    mkdir project && cd project || return
    printf '#include <stdio.h>\nint twice(int);\nint main(void) { return twice(2) != 4; }\n' >main.c
    printf 'int twice(int x) { return 2 * x; }\n' >twice.c
    # shellcheck disable=SC2016 # these are make's
    printf 'test: program\n\t./program\nprogram: main.o twice.o\n\t$(CC) -o $@ $^\n' >Makefile
    make -j2 test && [ -z "$(make -q program 2>&1)" ]
}

tar_and_copy() {
    local from=/usr/include/linux
    # Without owners, which are the caller's where that is an ordinary user.
    mkdir a && tar -c -C "$from" . | tar -x -C a && diff -r "$from" a && cp -a a b && diff -r a b &&
        rsync -rlpt a/ c/ && [ -z "$(rsync -rlptni --delete a/ c/)" ]
}

# The share as what an overlay is on, and as what it writes to.
overlay_on() {
    mkdir lower && echo lower >lower/file && mkdir lower/d && mkdir -p /run/overlay/{u,w,m} || return
    modprobe overlay && mount -t overlay overlay /run/overlay/m \
        -o "lowerdir=$PWD/lower,upperdir=/run/overlay/u,workdir=/run/overlay/w" || return
    overlay_changes /run/overlay/m
    local status=$?
    umount /run/overlay/m && rm -rf /run/overlay && [ "$(cat lower/file)" = lower ] && return "$status"
}

overlay_to() {
    mkdir -p /run/lower/d && echo lower | tee /run/lower/file >/run/lower/hidden || return
    mkdir u w m && modprobe overlay || return
    mount -t overlay overlay m -o lowerdir=/run/lower,upperdir=u,workdir=w || return
    rm m/hidden && overlay_changes m
    local status=$?
    # What is hidden has a whiteout in its place.
    umount m && rm -rf /run/lower && [ -c u/hidden ] && return "$status"
}

overlay_changes() {
    echo more >>"$1/file" && [ "$(cat "$1/file")" = $'lower\nmore' ] && cp "$1/file" "$1/new" &&
        mv "$1/file" "$1/gone" && rm "$1/gone" && mv "$1/new" "$1/file" && rm -r "$1/d" &&
        mkdir "$1/d" && touch "$1/d/x" && [ "$(ls "$1/d")" = x ] && [ "$(ls "$1")" = $'d\nfile' ]
}

# Remounting wants nothing open for writing, which the others leave behind.
pjdfstest "$configuration/pjdfstest.toml" erofs
sed 's/^allow_remount = true/allow_remount = false/' "$configuration/pjdfstest.toml" >/run/pjdfstest.toml
pjdfstest /run/pjdfstest.toml | grep -v erofs_

for seed in 1 2 3 4; do
    case_of "fsx/seed-$seed" "$tools/fsx" -f "$configuration/fsx.toml" -N 2500 -S "$seed" -P . file
done

for stressor in access chdir chmod chown copy-file dentry dir dirdeep dirmany dnotify dup fallocate fcntl \
    filename flock fpunch fsize fstat getdent hdd inotify io iomix lease link locka lockf lockofd \
    mknod open readahead rename seek sendfile splice symlink sync-file touch utime xattr; do
    case_of "stress-ng/$stressor" stress "$stressor"
done

case_of fio/psync fio_verify --rw=randrw --bs=4k --ioengine=psync
case_of fio/mmap fio_verify --rw=randwrite --bs=4k --ioengine=mmap
case_of fio/direct fio_verify --rw=randwrite --bs=4k --ioengine=libaio --direct=1 --iodepth=16
case_of fio/io_uring fio_verify --rw=randrw --bs=16k --ioengine=io_uring --iodepth=16

case_of work/sqlite-wal sqlite_wal
case_of work/git git_history
case_of work/make make_test
case_of work/tar tar_and_copy
case_of work/overlay-on overlay_on
case_of work/overlay-to overlay_to
echo "done"
