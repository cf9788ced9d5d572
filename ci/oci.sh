# shellcheck shell=bash
#
# Images as the OCI's image specification has them, made of folders. Sourced after ci/lib.sh; needs jq.
#
#     add_layer, add_image    as often as need be
#     finish_layout           then
#     pack_layout             and, if it is to be one file, this

# put_blob LAYOUT FILE - moves FILE into the layout's blobs and prints its digest.
put_blob() {
    local digest
    digest=$(sha256sum <"$2" | cut -d' ' -f1)
    mkdir -p "$1/blobs/sha256"
    mv "$2" "$1/blobs/sha256/$digest"
    printf 'sha256:%s\n' "$digest"
}

# add_layer LAYOUT ROOTFS - one layer, uncompressed: unpacking it takes a fraction of the time under
# emulation. Prints its digest and its size.
add_layer() {
    local layout=$1 rootfs=$2 size
    tar -C "$rootfs" --sort=name --mtime=@0 --numeric-owner --owner=0 --group=0 \
        --format=posix --pax-option=delete=atime,delete=ctime -cf "$layout/layer" .
    size=$(stat -c %s "$layout/layer")
    printf '%s %s\n' "$(put_blob "$layout" "$layout/layer")" "$size"
}

# add_image LAYOUT LAYER CONFIG NAME... - an image of one layer (what add_layer has printed) under one
# or more names. CONFIG is its "config" object, in JSON.
add_image() {
    local layout=$1 layer=${2% *} layer_size=${2#* } config=$3
    shift 3
    local config_size config_digest manifest_size manifest name
    jq -cn --argjson config "$config" --arg layer "$layer" '{
        created: "1970-01-01T00:00:00Z", architecture: "amd64", os: "linux", config: $config,
        rootfs: {type: "layers", diff_ids: [$layer]},
        history: [{created: "1970-01-01T00:00:00Z", created_by: "husk"}]}' >"$layout/config"
    config_size=$(stat -c %s "$layout/config")
    config_digest=$(put_blob "$layout" "$layout/config")
    jq -cn --arg config "$config_digest" --argjson config_size "$config_size" \
        --arg layer "$layer" --argjson layer_size "$layer_size" '{
        schemaVersion: 2, mediaType: "application/vnd.oci.image.manifest.v1+json",
        config: {mediaType: "application/vnd.oci.image.config.v1+json", digest: $config, size: $config_size},
        layers: [{mediaType: "application/vnd.oci.image.layer.v1.tar", digest: $layer, size: $layer_size}]
        }' >"$layout/manifest"
    manifest_size=$(stat -c %s "$layout/manifest")
    manifest=$(put_blob "$layout" "$layout/manifest")
    for name in "$@"; do
        jq -cn --arg digest "$manifest" --argjson size "$manifest_size" --arg name "$name" '{
            mediaType: "application/vnd.oci.image.manifest.v1+json", digest: $digest, size: $size,
            platform: {architecture: "amd64", os: "linux"},
            annotations: {"io.containerd.image.name": $name,
                "org.opencontainers.image.ref.name": ($name | split(":") | last)}}' >>"$layout/descriptors"
    done
}

# finish_layout LAYOUT - writes what makes a folder of blobs an OCI layout.
finish_layout() {
    jq -cs '{schemaVersion: 2, manifests: .}' "$1/descriptors" >"$1/index.json"
    rm "$1/descriptors"
    printf '{"imageLayoutVersion":"1.0.0"}' >"$1/oci-layout"
}

# pack_layout LAYOUT ARCHIVE - packs a finished layout, and removes it.
pack_layout() {
    tar -C "$1" --sort=name --mtime=@0 --numeric-owner --owner=0 --group=0 -cf "$2" oci-layout index.json blobs
    rm -rf "$1"
}
