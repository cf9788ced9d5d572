# shellcheck shell=bash
#
# What a node of Kubernetes has beside containerd: crictl (and critest), and plug-ins that give pods a
# network; and Kubernetes itself. Sourced after ci/lib.sh.

# Of the releases, the one that fits containerd 2.1 (Kubernetes 1.33 and later), and knows 1.7 as well.
CRI_TOOLS=v1.34.0
CRI_TOOLS_SUM=h1:KqL9EJ+WgHtz1HR1exezm91n+o8O2uMLs/eHzHJHAWw=

# build_cri_tools DIR - its own go.sum answers for what it is built from, and the sum here for itself.
build_cri_tools() {
    local dir=$1 module
    need_packages jq
    need_go 1.24.1
    say "building crictl and critest $CRI_TOOLS"
    module=$(cd "$dir" && GONOSUMDB=sigs.k8s.io/cri-tools GOFLAGS=-modcacherw \
        go mod download -json "sigs.k8s.io/cri-tools@$CRI_TOOLS")
    [ "$(jq -r .Sum <<<"$module")" = "$CRI_TOOLS_SUM" ] || die "cri-tools $CRI_TOOLS is not what it was"
    (
        cd "$(jq -r .Dir <<<"$module")" || exit
        export CGO_ENABLED=0 GOFLAGS='-mod=readonly -trimpath -buildvcs=false'
        local stamp="-s -w -X sigs.k8s.io/cri-tools/pkg/version.Version=$CRI_TOOLS"
        go build -ldflags "$stamp" -o "$dir/crictl" ./cmd/crictl
        go test -c -ldflags "$stamp" -o "$dir/critest" ./cmd/critest
    )
}

# cri_tools - prints the folder of crictl and critest.
cri_tools() {
    cached cri-tools "$(hash_of "$CRI_TOOLS" "$(declare -f build_cri_tools)")" build_cri_tools
}

# build_cni_plugins DIR
build_cni_plugins() {
    unpack_packages "$1" machine containernetworking-plugins
}

# cni_plugins - prints the folder of the CNI plug-ins.
cni_plugins() {
    local dir
    dir=$(cached cni-plugins "$(hash_of "$(package_version machine containernetworking-plugins)" \
        "$(declare -f build_cni_plugins)")" build_cni_plugins)
    printf '%s\n' "$dir/usr/lib/cni"
}

# What ci/kubernetes is, by the names that it is called by.
KUBERNETES_PROGRAMS='etcd kube-apiserver kube-controller-manager kube-scheduler kubelet kubectl'

# build_kubernetes DIR - what it is built from, and of which version, is in its go.mod and go.sum.
build_kubernetes() {
    local dir=$1 source=$HUSK_ROOT/ci/kubernetes version variable name stamp=
    need_go 1.24.0
    version=$(sed -n 's/^\tk8s.io\/kubernetes //p' "$source/go.mod")
    say "building Kubernetes $version"
    for variable in gitVersion=$version gitMajor=1 "gitMinor=$(cut -d. -f2 <<<"$version")"; do
        stamp+=" -X k8s.io/component-base/version.$variable"
    done
    (cd "$source" && CGO_ENABLED=0 GOFLAGS='-mod=readonly -modcacherw -trimpath -buildvcs=false' \
        go build -ldflags "-s -w$stamp" -o "$dir/kubernetes" .)
    for name in $KUBERNETES_PROGRAMS; do
        ln -s kubernetes "$dir/$name"
    done
}

# kubernetes_programs - prints the folder of Kubernetes' programs.
kubernetes_programs() {
    cached kubernetes "$(hash_of "$HUSK_ROOT"/ci/kubernetes/* "$KUBERNETES_PROGRAMS" \
        "$(declare -f build_kubernetes)")" build_kubernetes
}
