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
