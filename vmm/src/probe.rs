//! Whether the host's KVM really runs guests.
//!
//! That `/dev/kvm` opens proves little: there are hosts whose KVM emulates the guest's kernel in software, takes minutes
//! for a boot and lacks instructions. So a tiny guest uses two that such emulation does not have (a 16-byte
//! compare-and-exchange, and saving the extended state of the processor), says so by a port, and halts.

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::errno;

use crate::error::Error;
use crate::layout::BOOT_STACK_TOP;
use crate::{boot, kvm, memory, vcpu};

/// Why this host cannot run guests.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// KVM is missing, or too old, or refuses to make a VM.
    #[error("KVM cannot be used")]
    Kvm(#[from] Error),

    /// The processor, as KVM gives it to guests, lacks an instruction.
    #[error(
        "the host's KVM gives its guests no {instruction}: it is no hardware virtualization, or the processor is older \
         than 2011; use a machine that has it, or enable nested virtualization in the host of this one"
    )]
    MissingInstruction {
        /// Its name.
        instruction: &'static str,
    },

    /// The guest did something that a processor would not.
    #[error(
        "the host's KVM does not run a guest as a processor would ({what}): it is no hardware virtualization; use a \
         machine that has it, or enable nested virtualization in the host of this one"
    )]
    NotHardware {
        /// What it did.
        what: String,
    },
}

/// Where the program lies, and the two areas that it works on.
const CODE: u64 = 0x1_0000;
const OPERAND: u64 = 0x1_1000;
const EXTENDED_STATE: u64 = 0x1_2000;
const MEMORY_MIB: u32 = 1;

/// Where the guest says that all went well, and what it says.
const PORT: u16 = 0xf4;
const WELL: u8 = 0x5a;
/// What it exchanges zero for.
const EXCHANGED: [u64; 2] = [0x1234_5678, 0x0765_4321];

#[rustfmt::skip]
const PROGRAM: &[u8] = &[
    0x31, 0xc9,                         // xor ecx, ecx
    0x31, 0xd2,                         // xor edx, edx
    0xb8, 0x03, 0x00, 0x00, 0x00,       // mov eax, 3
    0x0f, 0x01, 0xd1,                   // xsetbv: x87 and SSE state
    0x31, 0xc0,                         // xor eax, eax
    0xbb, 0x78, 0x56, 0x34, 0x12,       // mov ebx, EXCHANGED[0]
    0xb9, 0x21, 0x43, 0x65, 0x07,       // mov ecx, EXCHANGED[1]
    0xf0, 0x48, 0x0f, 0xc7, 0x0f,       // lock cmpxchg16b [rdi]
    0x75, 0x11,                         // jne halt
    0xb8, 0x03, 0x00, 0x00, 0x00,       // mov eax, 3
    0x31, 0xd2,                         // xor edx, edx
    0x0f, 0xae, 0x26,                   // xsave [rsi]
    0x0f, 0xae, 0x2e,                   // xrstor [rsi]
    0xb0, WELL,                         // mov al, WELL
    0xe6, 0xf4,                         // out PORT, al
    0xf4,                               // halt: hlt
];

const CPUID_FEATURES: u32 = 1;
/// Leaf 1, ECX.
const CX16: u32 = 1 << 13;
const XSAVE: u32 = 1 << 26;
/// CR4: SSE, its exceptions, XSAVE.
const CR4_EXTENDED_STATE: u64 = 1 << 9 | 1 << 10 | 1 << 18;

/// Runs a tiny guest on the host's KVM.
///
/// # Errors
/// When no VM would work on this host; the error says why and what to do.
pub fn probe() -> Result<(), ProbeError> {
    let kvm = kvm::open()?;
    let vm = kvm.create_vm().map_err(|source| Error::Vm {
        operation: "make a VM",
        source,
    })?;
    let memory = memory::allocate(MEMORY_MIB, MEMORY_MIB)?;
    memory::register(&vm, &memory)?;
    write_program(&memory)?;
    let mut fd = vm.create_vcpu(0).map_err(failed("make the descriptor"))?;
    prepare(&kvm, &fd)?;
    run(&mut fd)?;
    check_operand(&memory)
}

fn write_program(memory: &GuestMemoryMmap) -> Result<(), Error> {
    boot::write_page_tables(memory)?;
    memory
        .write_slice(PROGRAM, GuestAddress(CODE))
        .map_err(|source| Error::WriteBootData {
            what: "probe",
            source,
        })
}

fn prepare(kvm: &Kvm, fd: &VcpuFd) -> Result<(), ProbeError> {
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|source| Error::Vm {
            operation: "tell what processor it supports",
            source,
        })?;
    let features = cpuid
        .as_slice()
        .iter()
        .find(|entry| entry.function == CPUID_FEATURES)
        .map_or(0, |entry| entry.ecx);
    for (bit, instruction) in [(CX16, "cmpxchg16b"), (XSAVE, "xsave")] {
        if features & bit == 0 {
            return Err(ProbeError::MissingInstruction { instruction });
        }
    }
    fd.set_cpuid2(&cpuid).map_err(failed("set CPUID"))?;
    let mut sregs = fd.get_sregs().map_err(failed("read the segments"))?;
    vcpu::set_long_mode(&mut sregs);
    sregs.cr4 |= CR4_EXTENDED_STATE;
    fd.set_sregs(&sregs).map_err(failed("set the segments"))?;
    let regs = kvm_regs {
        rip: CODE,
        rsp: BOOT_STACK_TOP,
        rdi: OPERAND,
        rsi: EXTENDED_STATE,
        rflags: 1 << 1,
        ..Default::default()
    };
    fd.set_regs(&regs).map_err(failed("set the registers"))?;
    Ok(())
}

/// The guest says that all went well, then halts.
fn run(fd: &mut VcpuFd) -> Result<(), ProbeError> {
    expect(fd, "it did not get to its end", |exit| {
        matches!(exit, VcpuExit::IoOut(PORT, [WELL]))
    })?;
    expect(fd, "it did not halt", |exit| matches!(exit, VcpuExit::Hlt))
}

/// The exchange has reached memory.
fn check_operand(memory: &GuestMemoryMmap) -> Result<(), ProbeError> {
    match memory.read_obj::<[u64; 2]>(GuestAddress(OPERAND)) {
        Ok(EXCHANGED) => Ok(()),
        found => Err(ProbeError::NotHardware {
            what: format!("its exchange left {found:x?} in memory"),
        }),
    }
}

fn expect(
    fd: &mut VcpuFd,
    otherwise: &str,
    as_hoped: impl FnOnce(&VcpuExit<'_>) -> bool,
) -> Result<(), ProbeError> {
    let what = match fd.run() {
        Ok(exit) if as_hoped(&exit) => return Ok(()),
        Ok(exit) => format!("{otherwise}, but left with {exit:?}"),
        Err(err) => format!("{otherwise}: {err}"),
    };
    Err(ProbeError::NotHardware { what })
}

fn failed(operation: &'static str) -> impl FnOnce(errno::Error) -> Error {
    move |source| Error::Vcpu {
        vcpu: 0,
        operation,
        source,
    }
}
