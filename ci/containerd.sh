# shellcheck shell=bash
#
# containerd for tests: which versions there are, where their programs are, and one instance of it
# beside whatever else a machine runs. Sourced after ci/lib.sh.

# build_containerd DIR RELEASE - the daemon, ctr and runc's shim as RELEASE has them.
build_containerd() {
    unpack_packages "$1" "$2" containerd
}

# build_runc DIR - Debian 12's for each of them: a newer one needs a newer C library.
build_runc() {
    unpack_packages "$1" machine runc
}

# containerd_path VERSION - fetches containerd 1.6, 1.7 or 2.1 and runc, as Debian has them, and
# prints the folders of their programs, for PATH. Nothing is installed.
containerd_path() {
    local version=$1 release containerd runc
    case $version in
    1.6) release=machine ;;
    1.7) release=trixie ;;
    2.1) release=sid ;;
    *) die "there is no containerd $version here: 1.6, 1.7 or 2.1" ;;
    esac
    # libseccomp is what runc is linked with, python3 what ci/await-ready is written in.
    need_packages libseccomp2 python3
    containerd=$(cached "containerd-$version" \
        "$(hash_of "$(package_version "$release" containerd)" "$(declare -f build_containerd)")" \
        build_containerd "$release")
    runc=$(cached runc "$(hash_of "$(package_version machine runc)" "$(declare -f build_runc)")" build_runc)
    printf '%s\n' "$containerd/usr/bin:$runc/usr/sbin"
}

# containerd_settings VERSION - what a containerd of VERSION that speaks CRI is told beyond its defaults.
# Without VERSION it does not speak CRI.
containerd_settings() {
    local version=$1 images runtime sandbox_image
    case $version in
    '')
        cat <<'TOML'
version = 2
# Starting them takes as long as all the rest.
disabled_plugins = [
  "io.containerd.grpc.v1.cri",
  "io.containerd.cri.v1.images",
  "io.containerd.cri.v1.runtime",
  "io.containerd.podsandbox.controller.v1.podsandbox",
]
TOML
        return
        ;;
    1.*)
        echo 'version = 2'
        images=io.containerd.grpc.v1.cri runtime=io.containerd.grpc.v1.cri
        ;;
    *)
        echo 'version = 3'
        images=io.containerd.cri.v1.images runtime=io.containerd.cri.v1.runtime
        ;;
    esac
    sandbox_image='husk.test/pause:latest'
    if [ "$images" = "$runtime" ]; then
        printf '[plugins."%s"]\nsandbox_image = "%s"\n' "$images" "$sandbox_image"
        # Debian's looks elsewhere by default.
        printf '[plugins."%s".cni]\nbin_dir = "/opt/cni/bin"\n' "$images"
    else
        printf '[plugins."%s".pinned_images]\nsandbox = "%s"\n' "$images" "$sandbox_image"
    fi
    cat <<TOML
[plugins."$images".registry]
config_path = "/etc/containerd/certs.d"

[plugins."$runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."$runtime".containerd.runtimes.husk]
runtime_type = "io.containerd.husk.v2"
pod_annotations = ["io.husk.*"]
# The devices of a privileged container are its guest's.
privileged_without_host_devices = true
TOML
    case $version in
    1.*) ;;
    *)
        cat <<TOML

[plugins."$runtime".containerd.runtimes.husk-sandboxer]
runtime_type = "io.containerd.husk.v2"
sandboxer = "shim"
pod_annotations = ["io.husk.*"]
privileged_without_host_devices = true
TOML
        ;;
    esac
}

# containerd_start ROOT STATE LOG [VERSION] - starts the containerd of PATH with its data in ROOT and
# its sockets in STATE, and returns when it is ready; its process is in STATE/pid. With VERSION, which
# is its own, it speaks CRI.
containerd_start() {
    local root=$1 state=$2 log=$3 version=${4:-}
    mkdir -p "$root" "$state"
    {
        # The keys of no table, then the tables.
        # The score as in containerd's unit.
        printf 'root = "%s"\nstate = "%s"\noom_score = -999\n' "$root" "$state"
        containerd_settings "$version"
        printf '[grpc]\naddress = "%s/containerd.sock"\n[debug]\nlevel = "debug"\n' "$state"
    } >"$state/config.toml"
    "$HUSK_ROOT/ci/await-ready" "$state/pid" containerd --config "$state/config.toml" >"$log" 2>&1 || {
        tail -n 20 "$log" >&2
        return 1
    }
}

# containerd_import ADDRESS FOLDER - imports the images of a folder of archives.
containerd_import() {
    local image
    for image in "$2"/*.tar; do
        ctr --address "$1" images import "$image" >/dev/null
    done
}
