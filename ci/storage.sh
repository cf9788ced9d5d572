# shellcheck shell=bash
#
# What judges a file system, as static programs, so that they run in any container. Sourced after ci/lib.sh.

# Test suites that others have written: crates, each with its own Cargo.lock.
STORAGE_SUITES='pjdfstest@0.2.2 fsx@0.3.2'

# build_storage_suites DIR
build_storage_suites() {
    local dir=$1 suite
    need_rust
    for suite in $STORAGE_SUITES; do
        say "building $suite"
        # The explicit --target keeps the static linking away from build scripts and proc-macros.
        RUSTFLAGS='-C target-feature=+crt-static -C strip=symbols' nice cargo install --quiet --locked --no-track \
            --target x86_64-unknown-linux-gnu --target-dir "$dir/build" --root "$dir" "$suite"
    done
    rm -r "$dir/build"
}

# build_storage_programs DIR SOURCE - these, and what they do not ask.
build_storage_programs() {
    local dir=$1 source=$2 suites
    need_packages gcc libc6-dev
    suites=$(cached storage-suites "$(hash_of "$STORAGE_SUITES" "$(declare -f build_storage_suites)")" build_storage_suites)
    cp -t "$dir" "$suites"/bin/*
    gcc -static -O2 -s -Wall -Wextra -Werror -o "$dir/files" "$source"
    ln "$dir/files" "$dir/sleep"
}

# storage_programs - prints the folder of all of them.
storage_programs() {
    local source=$HUSK_ROOT/ci/conformance.d/suites/files.c
    cached storage-programs "$(hash_of "$STORAGE_SUITES" "$source" \
        "$(declare -f build_storage_suites build_storage_programs)")" build_storage_programs "$source"
}

# Without what would want more libraries, or the processor that it is built on.
FIO_OPTIONS='--build-static --disable-native --disable-numa --disable-rdma --disable-rados --disable-rbd --disable-http
    --disable-gfapi --disable-libnfs --disable-lex --disable-pmem --disable-xnvme --disable-libzbc --disable-tcmalloc --disable-dfs'

# build_storage_benches DIR SOURCE - fio, as Debian has its source, and what that does not measure.
build_storage_benches() {
    local dir=$1 source=$2 work
    need_packages gcc make libc6-dev xz-utils
    gcc -static -O2 -s -Wall -Wextra -Werror -o "$dir/metadata" "$source"
    work=$(mktemp -d "$dir/build.XXXXXX")
    cd "$work" || return
    say 'fetching the source of fio from Debian'
    apt_for sources apt-get -qq source --download-only --tar-only fio
    tar -xf fio_*.orig.tar.* --strip-components 1
    say 'building fio'
    # shellcheck disable=SC2086 # a list of options
    ./configure $FIO_OPTIONS >/dev/null
    nice make --silent --jobs "$(nproc)" fio >/dev/null 2>&1
    strip -o "$dir/fio" fio
    cd /
    rm -r "$work"
}

# storage_benches - prints the folder of what measures a file system.
storage_benches() {
    local source=$HUSK_ROOT/ci/bench.d/metadata.c
    cached storage-benches "$(hash_of "$(source_version sources fio)" "$source" "$FIO_OPTIONS" \
        "$(declare -f build_storage_benches)")" build_storage_benches "$source"
}

# What people work with, as Debian has it, on a disk: what ci/conformance.d/work runs.
WORK_PACKAGES='git,cargo,gcc,libc6-dev,procps,sqlite3,postgresql'
WORK_ARCHIVES='hello tree jq libjq1 libonig5 postgresql-doc-15'

# build_work_disk DIR
build_work_disk() {
    local dir=$1 root=$1/root archives
    need_packages mmdebstrap e2fsprogs debian-archive-keyring
    say "installing ${WORK_PACKAGES//,/, } of Debian in a folder"
    nice mmdebstrap --quiet --variant=essential --include="$WORK_PACKAGES" bookworm "$root" "$(debian_mirror)"
    mkdir "$root/archives"
    archives=$(mktemp -d)
    apt_refresh machine
    # shellcheck disable=SC2086 # a list of packages
    (cd "$archives" && apt_for machine apt-get -qq download $WORK_ARCHIVES)
    cp "$archives"/*.deb "$root/archives"
    rm -r "$archives"
    git init --quiet "$root/history"
    cp -rT "$root/usr/include" "$root/history/include"
    cp -rT "$root/usr/share" "$root/history/share"
    git -C "$root/history" add .
    git -C "$root/history" -c user.name=husk -c user.email=husk@example.org commit --quiet --message 'A large tree'
    git clone --quiet --bare "$root/history" "$root/history.git"
    rm -r "$root/history"
    truncate -s 4G "$dir/disk"
    mkfs.ext4 -q -i 8192 -d "$root" "$dir/disk"
    rm -r "$root"
    # To be copied at little cost. Whoever does makes it larger again.
    resize2fs -M "$dir/disk" >/dev/null 2>&1
}

# work_disk - prints the folder of the disk.
work_disk() {
    cached work-disk "$(hash_of "$WORK_PACKAGES" "$WORK_ARCHIVES" "$(declare -f build_work_disk)")" build_work_disk
}
