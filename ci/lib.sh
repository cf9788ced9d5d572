# shellcheck shell=bash
#
# What the scripts of ci/ share: messages, Debian packages, and the cache.
# Sourced, never run:
#
#     set -euo pipefail
#     . "$(dirname "$(readlink -f "$0")")/lib.sh"
#
# The rules that hold for every script here: it says on standard error what it is doing (standard
# output belongs to what it was asked to run), it installs or fetches what is missing, it may be run
# again at once or twice at the same time, and it cleans up after itself.

# A failing step inside $(...) ends that too.
shopt -s inherit_errexit

# Where Debian has depmod and modprobe, and what users who are not root do not search.
PATH=$PATH:/usr/sbin:/sbin

# The repository's root, whatever the caller's working directory.
HUSK_ROOT=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")

# Everything that is expensive to make again lives here, one folder per hash of its inputs.
HUSK_CACHE=${HUSK_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/husk}

# Where cargo puts what it builds, and where ci/guest puts what a guest boots.
# shellcheck disable=SC2034 # for those who source this file
HUSK_TARGET=${CARGO_TARGET_DIR:-$HUSK_ROOT/target}
# shellcheck disable=SC2034 # for those who source this file
HUSK_GUEST_DIR=$HUSK_ROOT/target/guest

# say MESSAGE... - tells what is being done.
say() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
}

# die MESSAGE... - ends the script with a reason.
die() {
    say "error: $*"
    exit 1
}

# as_root COMMAND... - runs COMMAND as root, by sudo if need be.
as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "'$*' needs root and there is no sudo; run this script as root"
    fi
}

# why_no_kvm command|as_root - prints why this machine cannot run VMs at full speed for who runs this, or for root;
# nothing if it can. /dev/kvm alone proves nothing: it may be a software fallback, which cannot run a kernel in any
# useful time.
why_no_kvm() {
    local refusal
    if ! grep -qwE 'svm|vmx' /proc/cpuinfo; then
        echo 'its processor offers no hardware virtualization'
    elif [ ! -e /dev/kvm ]; then
        echo '/dev/kvm is not there'
    else
        need_packages python3
        # KVM_CREATE_VM
        refusal=$("$1" python3 -c 'import fcntl; fcntl.ioctl(open("/dev/kvm", "r+b", buffering=0), 0xAE01, 0)' 2>&1) ||
            printf 'KVM refuses: %s\n' "$(tail -n 1 <<<"$refusal")"
    fi
}

# why_no_nested_kvm - prints why a VM of this machine could not run VMs of its own at full speed; nothing if it could.
why_no_nested_kvm() {
    local why
    why=$(why_no_kvm command)
    if [ -n "$why" ]; then
        printf '%s\n' "$why"
    elif ! grep -qsE '^[Y1]' /sys/module/kvm_{amd,intel}/parameters/nested; then
        echo 'its KVM does not let a VM have VMs of its own (the parameter nested of kvm_intel or kvm_amd)'
    fi
}

# on_exit COMMAND - adds a clean-up step; steps run in reverse order however the script ends.
HUSK_CLEANUP=
on_exit() {
    HUSK_CLEANUP="$1${HUSK_CLEANUP:+; $HUSK_CLEANUP}"
    # shellcheck disable=SC2064 # expanded now on purpose: the list as it stands
    trap "$HUSK_CLEANUP" EXIT
}

# hash_of FILE|STRING... - one short hash over the contents of files and over plain words.
hash_of() {
    local item
    for item in "$@"; do
        if [ -f "$item" ]; then
            sha256sum <"$item"
        else
            printf '%s\n' "$item"
        fi
    done | sha256sum | cut -c1-16
}

# cached NAME HASH BUILDER [ARGS...] - prints the cache folder for NAME at HASH.
# If it is not there, runs `BUILDER DIR ARGS...` to fill it. The folder appears whole or not at all
# (built beside, then renamed), and of two scripts that want it at once one builds and one waits.
cached() {
    local name=$1 hash=$2 builder=$3
    shift 3
    local dir=$HUSK_CACHE/$name-$hash
    mkdir -p "$HUSK_CACHE"
    if [ ! -d "$dir" ]; then
        exec {HUSK_LOCK}>"$HUSK_CACHE/.$name.lock"
        flock "$HUSK_LOCK"
        if [ ! -d "$dir" ]; then
            local partial=$HUSK_CACHE/.$name-$hash.partial
            rm -rf "$partial"
            mkdir -p "$partial"
            # bash ignores a failing step of whatever is called in a condition, so the builder's
            # status is caught without one, and `cached` itself must not be called in one.
            local status
            set +e
            (
                set -e
                "$builder" "$partial" "$@"
            ) >&2
            status=$?
            set -e
            if [ "$status" -ne 0 ]; then
                die "building $name failed; what it left is in $partial"
            fi
            mv "$partial" "$dir"
        fi
        exec {HUSK_LOCK}>&-
    fi
    # The newest use, for whoever prunes the cache by age.
    touch "$dir"
    printf '%s\n' "$dir"
}

# build_rust DIR - trixie's Rust for building browsers, which Debian keeps new, made to find the C library and the others that
# it was linked with. What it builds is linked with this machine's.
build_rust() {
    local dir=$1 packages library program place
    mapfile -t packages < <(
        apt_for trixie apt-get -o Dir::State::status=/dev/null -s --no-install-recommends install "${RUST_PACKAGES[@]}" |
            sed -n 's/^Inst \([^ ]*\).*/\1/p' | grep -E '^(zlib1g|lib.*|.*(rust|cargo).*)$' | grep -vE '^lib(c6|gcc|crypt).*-dev$'
    )
    unpack_packages "$dir" trixie "${packages[@]}"
    # It is renamed when it is complete.
    place=$(rust_folder)
    for library in "$dir"/usr/lib/x86_64-linux-gnu/*.so*; do
        # Its own search path comes before that of the program, and leads elsewhere.
        if [ ! -L "$library" ] && [ -n "$(patchelf --print-rpath "$library" 2>/dev/null)" ]; then
            patchelf --remove-rpath "$library"
        fi
    done
    for program in cargo cargo-clippy cargo-fmt clippy-driver rustc rustdoc rustfmt; do
        patchelf --set-interpreter "$place/usr/lib64/ld-linux-x86-64.so.2" \
            --force-rpath --set-rpath "$place/usr/lib/x86_64-linux-gnu" "$dir/usr/bin/$program"
    done
    rm -f "$dir/usr/bin/gencat"
}
RUST_PACKAGES=(cargo-web rustc-web rust-web-clippy rustfmt-web)

# rust_folder - where `cached` puts it.
rust_folder() {
    printf '%s/rust-%s\n' "$HUSK_CACHE" \
        "$(hash_of "$(package_version trixie rustc-web)" "$HUSK_CACHE" "${RUST_PACKAGES[*]}" "$(declare -f build_rust)")"
}

# rust_version - the toolchain's version, if there is one.
rust_version() {
    cargo --version 2>/dev/null | cut -d' ' -f2
}

# need_rust - a Rust toolchain, as new as the workspace asks for; where the machine has none, Debian's, beside what is installed.
need_rust() {
    # libseccomp, and libbpf with what it needs (the device controller of cgroup v2), are linked into
    # the agent.
    need_packages gcc make libc6-dev pkg-config libseccomp-dev libelf-dev zlib1g-dev
    command -v cargo >/dev/null || PATH=$HOME/.cargo/bin:$PATH
    local wanted found folder
    wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$HUSK_ROOT/Cargo.toml")
    found=$(rust_version || :)
    if dpkg --compare-versions "${found:-0}" ge "$wanted"; then
        return
    fi
    say "the machine has ${found:-no} Rust, and husk needs $wanted or newer: using Debian's"
    need_packages patchelf
    folder=$(rust_folder)
    folder=$(cached rust "${folder##*/rust-}" build_rust)
    PATH=$folder/usr/bin:$PATH
    found=$(rust_version || :)
    dpkg --compare-versions "${found:-0}" ge "$wanted" ||
        die "Debian's Rust ${found:-} is too old: install $wanted or newer with rustup"
}

# need_rust_component COMPONENT - a part of the toolchain that the smallest installation lacks: clippy, rustfmt.
need_rust_component() {
    local command=${1#rust}
    need_rust
    if ! cargo "$command" --version >/dev/null 2>&1; then
        command -v rustup >/dev/null || die "the Rust toolchain has no $1"
        say "adding $1 to the Rust toolchain"
        rustup component add "$1" >&2
    fi
}

# build_go DIR - trixie's, which is linked with nothing.
build_go() {
    unpack_packages "$1" trixie golang-1.24-go golang-1.24-src
}

# need_go VERSION - a Go toolchain that is as new; where the machine has none, Debian's, beside what is installed.
need_go() {
    local found
    if found=$(go env GOVERSION 2>/dev/null) && dpkg --compare-versions "${found#go}" ge "$1"; then
        return
    fi
    found=$(cached go "$(hash_of "$(package_version trixie golang-1.24-go)" "$(declare -f build_go)")" build_go)
    PATH=$found/usr/lib/go-1.24/bin:$PATH
}

# build_virtiofsd DIR - trixie's, with the libraries that it was linked with, and a program that starts it with them.
build_virtiofsd() {
    unpack_packages "$1" trixie virtiofsd libc6 libcap-ng0 libgcc-s1 libseccomp2
    cat >"$1/virtiofsd" <<'SH'
#!/bin/sh
usr=${0%/*}/usr
exec "$usr/lib64/ld-linux-x86-64.so.2" --library-path "$usr/lib/x86_64-linux-gnu" "$usr/libexec/virtiofsd" "$@"
SH
    chmod 0755 "$1/virtiofsd"
}

# virtiofsd_path - fetches Debian's file server, the one that tests use, and prints where it is.
virtiofsd_path() {
    local dir
    dir=$(cached virtiofsd "$(hash_of "$(package_version trixie virtiofsd)" "$(declare -f build_virtiofsd)")" build_virtiofsd)
    printf '%s\n' "$dir/virtiofsd"
}

# --- Debian packages -------------------------------------------------------------------------

# debian_mirror - prints the address of the Debian archive that this machine itself uses.
debian_mirror() {
    local mirror
    # shellcheck disable=SC2016 # apt-get's own variables
    mirror=$(apt-get indextargets --format '$(REPO_URI) $(ORIGIN) $(LABEL)' 2>/dev/null |
        awk '$2 == "Debian" && $3 == "Debian" { sub("/$", "", $1); print $1; exit }')
    printf '%s\n' "${mirror:-http://deb.debian.org/debian}"
}

# apt_for RELEASE COMMAND... - runs an apt command against RELEASE alone, with lists and archives
# of its own: neither the machine's own sources (some of which may be down) nor what they say
# matter, and nothing that is fetched here changes what the machine's apt sees.
# RELEASE is a suite; or `machine`: Debian 12 with its backports, from which the scripts install; or `sources`: the
# source packages of these two.
apt_for() {
    local release=$1 command=$2
    shift 2
    local dir=$HUSK_CACHE/apt/$release
    "$command" \
        -o Dir::Etc::SourceList="$dir/sources.list" -o Dir::Etc::SourceParts=- \
        -o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts="$dir/preferences.d" \
        -o Dir::State::Lists="$dir/lists" -o Dir::Cache="$dir" \
        -o APT::Sandbox::User=root -o Acquire::Retries=3 \
        -o Acquire::Languages=none -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false \
        "$@"
}

# apt_refresh RELEASE - fetches RELEASE's package lists, at most once a day.
apt_refresh() {
    local release=$1
    local dir=$HUSK_CACHE/apt/$release
    local mirror suites kind=deb
    case $release in
    machine) suites='bookworm bookworm-updates bookworm-backports' ;;
    sources) suites='bookworm bookworm-backports' kind=deb-src ;;
    *) suites=$release ;;
    esac
    if [ -n "$(find "$dir/fresh" -mmin -1440 2>/dev/null)" ] && [ "$(cat "$dir/fresh")" = "$suites" ]; then
        return
    fi
    mirror=$(debian_mirror)
    mkdir -p "$dir/lists/partial" "$dir/archives/partial" "$dir/preferences.d"
    exec {HUSK_APT_LOCK}>"$dir/lock"
    flock "$HUSK_APT_LOCK"
    local suite
    for suite in $suites; do
        printf '%s [signed-by=%s] %s %s main\n' "$kind" \
            /usr/share/keyrings/debian-archive-keyring.gpg "$mirror" "$suite"
    done >"$dir/sources.list"
    say "reading Debian's package lists ($suites)"
    apt_for "$release" apt-get -qq update >&2 || die "Debian's package lists at $mirror cannot be read"
    printf '%s\n' "$suites" >"$dir/fresh"
    exec {HUSK_APT_LOCK}>&-
}

# need_packages PACKAGE[>=VERSION]... - installs what of these the machine lacks. Where a version is
# asked for, the package and what it depends on may come from the backports.
need_packages() {
    local wanted package version status installed missing=() target=bookworm
    for wanted in "$@"; do
        package=${wanted%%>=*}
        version=${wanted#"$package"}
        version=${version#>=}
        read -r status installed < <(
            dpkg-query -W -f '${db:Status-Status} ${Version}\n' "$package" 2>/dev/null || echo none none
        )
        if [ "$status" = installed ] && dpkg --compare-versions "$installed" ge "${version:-0}"; then
            continue
        fi
        missing+=("$package")
        [ -z "$version" ] || target=bookworm-backports
    done
    if [ "${#missing[@]}" -eq 0 ]; then
        return
    fi
    apt_refresh machine
    say "installing ${missing[*]}"
    local log
    log=$(mktemp)
    # shellcheck disable=SC2016 # for the inner shell
    if ! as_root env DEBIAN_FRONTEND=noninteractive HUSK_CACHE="$HUSK_CACHE" \
        bash -c '. "$0"; apt_for machine apt-get -qq -y --no-install-recommends \
            -o DPkg::Lock::Timeout=600 -o Dpkg::Use-Pty=0 "$@"' \
        "$HUSK_ROOT/ci/lib.sh" -t "$target" install "${missing[@]}" >"$log" 2>&1; then
        cat "$log" >&2
        rm -f "$log"
        die "installing ${missing[*]} failed"
    fi
    rm -f "$log"
}

# package_version RELEASE PACKAGE - the version that RELEASE offers.
package_version() {
    apt_refresh "$1"
    apt_for "$1" apt-cache --no-all-versions show "$2" 2>/dev/null |
        sed -n 's/^Version: //p' | head -n1
}

# source_version RELEASE PACKAGE - the version that RELEASE offers of a source package.
source_version() {
    apt_refresh "$1"
    apt_for "$1" apt-cache --only-source showsrc "$2" 2>/dev/null |
        sed -n 's/^Version: //p' | sort -V | tail -n1
}

# unpack_packages DIR RELEASE PACKAGE[/SUITE]... - fetches packages and unpacks them below DIR
# without installing them.
unpack_packages() {
    local dir=$1 release=$2
    shift 2
    apt_refresh "$release"
    say "fetching $* from Debian ($release)"
    local debs deb
    debs=$(mktemp -d)
    # A shell of its own, so that the packages go however it ends.
    (
        trap 'rm -rf "$debs"' EXIT
        (cd "$debs" && apt_for "$release" apt-get -qq download "$@") >&2
        for deb in "$debs"/*.deb; do
            dpkg -x "$deb" "$dir"
        done
    )
}
