//! Steers the connections to every port of 127.0.0.0/8 in a network namespace to one listening socket of it: a BPF program
//! that the kernel asks when a connection looks for its listener (`BPF_PROG_TYPE_SK_LOOKUP`, Linux 5.9). The accepted
//! socket's own address says which port was meant. Nothing in the namespace is changed, and what is here is no more than
//! descriptors: the kernel forgets it with the process that holds them.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::libc::{self, c_int, c_long};
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};

// The commands and types of linux/bpf.h.
const MAP_CREATE: c_int = 0;
const MAP_UPDATE_ELEM: c_int = 2;
const PROG_LOAD: c_int = 5;
const LINK_CREATE: c_int = 28;
const MAP_TYPE_SOCKMAP: u32 = 15;
const PROG_TYPE_SK_LOOKUP: u32 = 30;
const ATTACH_SK_LOOKUP: u32 = 36;

/// Functions of the kernel that the program calls.
const MAP_LOOKUP_ELEM: i32 = 1;
const SK_RELEASE: i32 = 86;
const SK_ASSIGN: i32 = 124;

/// `local_ip4` of the program's argument, a `struct bpf_sk_lookup`, of which the first byte comes first.
const LOCAL_IP4: i16 = 40;

/// The first byte of the addresses that are the pod's own, 127.0.0.0/8.
const LOOPBACK: i32 = 127;

#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Instruction {
    code: u8,
    /// Source in the upper half, destination in the lower one.
    registers: u8,
    offset: i16,
    immediate: i32,
}

#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

#[repr(C)]
struct MapUpdate {
    map: c_int,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct ProgLoad {
    prog_type: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
}

#[repr(C)]
struct LinkCreate {
    program: c_int,
    target: c_int,
    attach_type: u32,
    flags: u32,
}

/// From now on `listener` gets what is connected to 127.0.0.0/8 in `namespace`, which has to be its own; until the returned
/// descriptor is closed.
pub(super) fn steer(listener: &impl AsFd, namespace: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // Before 5.11 maps and programs count towards this limit, for all shims together. Where it cannot be raised it may do.
    let _ = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);
    let map = socket_map(listener)?;
    let program = load(&program(map.as_raw_fd()))?;
    let link = LinkCreate {
        program: program.as_raw_fd(),
        target: namespace.as_raw_fd(),
        attach_type: ATTACH_SK_LOOKUP,
        flags: 0,
    };
    // SAFETY: `LinkCreate` is what the command takes, and it has no addresses.
    unsafe { bpf_descriptor(LINK_CREATE, &link) }
}

/// A map whose only entry is the socket.
fn socket_map(listener: &impl AsFd) -> io::Result<OwnedFd> {
    let create = MapCreate {
        map_type: MAP_TYPE_SOCKMAP,
        key_size: 4,
        value_size: 8,
        max_entries: 1,
    };
    // SAFETY: `MapCreate` is what the command takes, and it has no addresses.
    let map = unsafe { bpf_descriptor(MAP_CREATE, &create) }?;
    let key = 0_u32;
    let value = u64::from(listener.as_fd().as_raw_fd().cast_unsigned());
    let update = MapUpdate {
        map: map.as_raw_fd(),
        padding: 0,
        key: (&raw const key).addr() as u64,
        value: (&raw const value).addr() as u64,
        flags: 0,
    };
    // SAFETY: `MapUpdate` is what the command takes; the key and the value are as long as the map has them, and outlive
    // the call.
    unsafe { bpf(MAP_UPDATE_ELEM, &update) }?;
    Ok(map)
}

/// Chooses the socket in `map`, if the connection is one to the loopback addresses. Where the socket does not suit, since it
/// is no TCP that looks for a listener, the kernel declines, and goes on as if the program had said nothing.
fn program(map: c_int) -> [Instruction; 19] {
    const MOVE: u8 = 0xbf;
    const MOVE_IMMEDIATE: u8 = 0xb7;
    const ADD_IMMEDIATE: u8 = 0x07;
    const LOAD_BYTE: u8 = 0x71;
    const LOAD_MAP: u8 = 0x18;
    const STORE_IMMEDIATE: u8 = 0x62;
    const JUMP_IF_EQUAL: u8 = 0x15;
    const JUMP_UNLESS_EQUAL: u8 = 0x55;
    const CALL: u8 = 0x85;
    const EXIT: u8 = 0x95;
    const FRAME: u8 = 10;
    let instruction = |code, destination: u8, source: u8, offset, immediate| Instruction {
        code,
        registers: source << 4 | destination,
        offset,
        immediate,
    };
    // r1 to r5 are arguments, r0 is what a call returns, r6 to r9 stay, r10 is the frame.
    [
        instruction(MOVE, 6, 1, 0, 0),
        // if local_ip4[0] != 127 goto pass
        instruction(LOAD_BYTE, 1, 6, LOCAL_IP4, 0),
        instruction(JUMP_UNLESS_EQUAL, 1, 0, 14, LOOPBACK),
        // r0 = map[0], a socket that is ours until it is released
        instruction(STORE_IMMEDIATE, FRAME, 0, -4, 0),
        instruction(MOVE, 2, FRAME, 0, 0),
        instruction(ADD_IMMEDIATE, 2, 0, 0, -4),
        instruction(LOAD_MAP, 1, 1, 0, map),
        instruction(0, 0, 0, 0, 0),
        instruction(CALL, 0, 0, 0, MAP_LOOKUP_ELEM),
        instruction(JUMP_IF_EQUAL, 0, 0, 7, 0),
        // assign(r6, r0, 0)
        instruction(MOVE, 7, 0, 0, 0),
        instruction(MOVE, 1, 6, 0, 0),
        instruction(MOVE, 2, 7, 0, 0),
        instruction(MOVE_IMMEDIATE, 3, 0, 0, 0),
        instruction(CALL, 0, 0, 0, SK_ASSIGN),
        instruction(MOVE, 1, 7, 0, 0),
        instruction(CALL, 0, 0, 0, SK_RELEASE),
        // pass: return SK_PASS
        instruction(MOVE_IMMEDIATE, 0, 0, 0, 1),
        instruction(EXIT, 0, 0, 0, 0),
    ]
}

fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    let load = ProgLoad {
        prog_type: PROG_TYPE_SK_LOOKUP,
        count: u32::try_from(program.len()).map_err(io::Error::other)?,
        instructions: program.as_ptr().addr() as u64,
        license: c"Apache-2.0".as_ptr().addr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
        name: *b"husk_forward\0\0\0\0",
        interface: 0,
        attach_type: ATTACH_SK_LOOKUP,
    };
    // SAFETY: `ProgLoad` is what the command takes; the instructions are `count` many and the license ends with a zero, and
    // both outlive the call.
    unsafe { bpf_descriptor(PROG_LOAD, &load) }
}

/// bpf(2), for a command that answers with a descriptor.
///
/// # Safety
/// That of [`bpf`], and `command` has to be such a command.
unsafe fn bpf_descriptor<T>(command: c_int, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: as the caller has promised.
    let answer = unsafe { bpf(command, attributes) }?;
    let descriptor = c_int::try_from(answer).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us (with close-on-exec).
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// bpf(2). Attributes that are shorter than the kernel's are as if zeros followed.
///
/// # Safety
/// `attributes` has to be the beginning of what `command` takes, and the addresses in it those of memory that the command
/// may read as far as it does.
unsafe fn bpf<T>(command: c_int, attributes: &T) -> io::Result<c_long> {
    // SAFETY: the kernel reads as many bytes of the attributes as we say; the rest is the caller's promise.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(answer)
}
