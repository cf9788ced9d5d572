# shellcheck shell=bash
#
# Sourced by what runs tests in containers, in the node, on a disk with an ext4.
#
# on_disk DISK POINT SHARING CACHE DAX RUNTIMES COMMAND OPTION... - runs a container for each of RUNTIMES in turn, with `ctr run`'s
# OPTIONs, which has the disk in the file DISK at POINT while a shell runs COMMAND. With SHARING virtio-fs or 9p the disk is mounted on
# the node, and POINT is a folder of the node's; with SHARING disk, husk's container, which has to be privileged for that, has it as
# a device, and mounts it. SHARING, CACHE and DAX are keys of husk's table [storage]. What a container says is in
# $OUT/RUNTIME.tests. Tests that fail are no failure here; a container that fails is.
on_disk() {
    local disk=$1 point=$2 sharing=$3 cache=$4 dax=$5 runtimes=$6 command=$7
    shift 7
    local folder device where=folder runtime options mount
    folder=$(mktemp -d)
    mkdir "$folder/mnt"
    device=$(losetup --find --show "$disk")
    if [ "$sharing" = disk ]; then
        where=disk sharing=virtio-fs
    fi
    printf '[storage]\nsharing = "%s"\ncache = "%s"\ndax_window_mib = %s\n' "$sharing" "$cache" "$dax" >"$folder/husk.toml"
    for runtime in $runtimes; do
        options=("$@")
        [ "$runtime" != husk ] || options+=(--runtime-config-path "$folder/husk.toml")
        mount=:
        if [ "$where" = disk ] && [ "$runtime" = husk ]; then
            options+=(--device "$device")
            mount="mkdir -p $point; mount $device $point"
        else
            mount "$device" "$folder/mnt"
            options+=(--mount "type=bind,src=$folder/mnt,dst=$point,options=rbind:rw")
        fi
        printf 'tests with %s\n' "$runtime"
        ctr run --rm --runtime "io.containerd.$runtime.v2" "${options[@]}" \
            --mount "type=bind,src=$PWD/ci/conformance.d/suites,dst=/suites,options=rbind:ro" \
            husk.test/busybox:latest "tests-$runtime" sh -ec "$mount; $command" >"$OUT/$runtime.tests" || {
            tail -n 20 "$OUT/$runtime.tests" >&2
            return 1
        }
        ! mountpoint -q "$folder/mnt" || umount "$folder/mnt"
    done
    losetup --detach "$device"
}
