//! The registers of an x86-64 vCPU: how they start, how they are saved and restored.

use std::fmt::Write as _;

use kvm_bindings::{
    KVM_EXIT_INTERNAL_ERROR, KVM_MAX_CPUID_ENTRIES, KVM_MAX_MSR_ENTRIES, Msrs, kvm_debugregs,
    kvm_dtable, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_run, kvm_segment,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd};
use serde::{Deserialize, Serialize};
use vm_memory::{Address, GuestAddress};
use vmm_sys_util::errno;

use super::cpuid::{self, CpuidEntry};
use crate::boot::GDT;
use crate::error::Error;
use crate::layout::{BOOT_PARAMS_BASE, BOOT_STACK_TOP, GDT_BASE, PAGE_TABLES_BASE};

const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1 << 0;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs are on, and what none of them covers (everything) is write-back.
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

const CR0_PE: u64 = 1 << 0;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The bit of RFLAGS that is always set.
const RFLAGS_RESERVED: u64 = 1 << 1;
const BOOT_CS: u16 = 0x10;
const BOOT_DS: u16 = 0x18;

/// What all vCPUs of a VM have in common.
#[derive(Debug)]
pub(crate) struct CpuModel {
    cpuid: Vec<CpuidEntry>,
    /// The model-specific registers that make up the state of a vCPU.
    msrs: Vec<u32>,
    vcpus: u8,
    address_bits: u32,
}

impl CpuModel {
    /// The host's processor as far as KVM can give it to a guest with `vcpus` vCPUs.
    pub(crate) fn new(kvm: &Kvm, vcpus: u8) -> Result<Self, Error> {
        let of_kvm = |operation| move |source| Error::Vm { operation, source };
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(of_kvm("tell what processor it supports"))?;
        let msrs = kvm
            .get_msr_index_list()
            .map_err(of_kvm("tell what model-specific registers it supports"))?;
        let deadline_timer = kvm.check_extension(Cap::TscDeadlineTimer);
        Ok(Self {
            cpuid: cpuid::model(supported.as_slice(), vcpus, deadline_timer),
            msrs: msrs.as_slice().to_vec(),
            vcpus,
            address_bits: cpuid::address_bits(supported.as_slice()),
        })
    }

    /// Bits of the guest's physical addresses.
    pub(crate) fn address_bits(&self) -> u32 {
        self.address_bits
    }
}

/// The state of a vCPU as data. What the guest sees of the processor (CPUID) is no part of it: it comes from the
/// configuration and the host.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct VcpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: Vec<(u32, u64)>,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<(u32, u64)>,
    events: kvm_vcpu_events,
}

/// A vCPU's descriptor, and all that is done with it but running.
#[derive(Debug)]
pub(in super::super) struct Registers {
    index: u8,
    fd: VcpuFd,
    msrs: Vec<u32>,
}

impl Registers {
    /// Gives a new vCPU its model. Its registers are those of a reset.
    pub(in super::super) fn new(index: u8, fd: VcpuFd, model: &CpuModel) -> Result<Self, Error> {
        let registers = Self {
            index,
            fd,
            msrs: model.msrs.clone(),
        };
        let cpuid = cpuid::for_vcpu(&model.cpuid, index, model.vcpus);
        let cpuid = kvm_bindings::CpuId::from_entries(&cpuid)
            .expect("no more entries than KVM itself gave, which is what it takes");
        registers.check("set CPUID", registers.fd.set_cpuid2(&cpuid))?;
        registers.set_msrs(&[
            (MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
            (MSR_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK),
        ])?;
        // KVM resets a local APIC before the VM has the vCPU, so that its table of where interrupts go lacks the one made
        // last until some local APIC changes. Of a vCPU that is plugged in alone, none would: it would never be started.
        let lapic = registers.check("read the local APIC", registers.fd.get_lapic())?;
        registers.check("set the local APIC", registers.fd.set_lapic(&lapic))?;
        Ok(registers)
    }

    pub(in super::super) fn index(&self) -> u8 {
        self.index
    }

    /// The page that KVM shares with this process, mapped as long as self lives.
    pub(in super::super) fn shared_page(&mut self) -> *mut kvm_run {
        self.fd.get_kvm_run()
    }

    pub(in super::super) fn clear_immediate_exit(&mut self) {
        self.fd.set_kvm_immediate_exit(0);
    }

    /// Enters the guest.
    pub(in super::super) fn run(&mut self) -> Result<VcpuExit<'_>, errno::Error> {
        self.fd.run()
    }

    /// Starts at `entry` as the 64-bit boot protocol wants it: long mode, flat segments, the first GiB mapped one to
    /// one, the boot parameters in RSI (Documentation/arch/x86/boot.rst).
    pub(in super::super) fn boot_at(&self, entry: GuestAddress) -> Result<(), Error> {
        let mut sregs = self.check("read the segments", self.fd.get_sregs())?;
        set_long_mode(&mut sregs);
        self.check("set the segments", self.fd.set_sregs(&sregs))?;
        let regs = kvm_regs {
            rip: entry.raw_value(),
            rsp: BOOT_STACK_TOP,
            rsi: BOOT_PARAMS_BASE,
            rflags: RFLAGS_RESERVED,
            ..Default::default()
        };
        self.check("set the registers", self.fd.set_regs(&regs))
    }

    pub(in super::super) fn save(&self) -> Result<VcpuState, Error> {
        let xcrs = self.check("read the extended control registers", self.fd.get_xcrs())?;
        let xcr_count = usize::try_from(xcrs.nr_xcrs).unwrap_or(usize::MAX);
        Ok(VcpuState {
            // First: reading it makes KVM process INIT and SIPI that are pending, which changes the rest.
            mp_state: self.check("read the run state", self.fd.get_mp_state())?,
            regs: self.check("read the registers", self.fd.get_regs())?,
            sregs: self.check("read the segments", self.fd.get_sregs())?,
            xsave: self.check("read the extended state", self.fd.get_xsave())?,
            xcrs: xcrs
                .xcrs
                .iter()
                .take(xcr_count)
                .map(|xcr| (xcr.xcr, xcr.value))
                .collect(),
            debug_regs: self.check("read the debug registers", self.fd.get_debug_regs())?,
            lapic: self.check("read the local APIC", self.fd.get_lapic())?,
            msrs: self.get_msrs()?,
            events: self.check("read the pending events", self.fd.get_vcpu_events())?,
        })
    }

    pub(in super::super) fn restore(&self, state: &VcpuState) -> Result<(), Error> {
        self.check("set the run state", self.fd.set_mp_state(state.mp_state))?;
        self.check("set the registers", self.fd.set_regs(&state.regs))?;
        // Before the local APIC, whose mode is in here.
        self.check("set the segments", self.fd.set_sregs(&state.sregs))?;
        let mut xcrs = kvm_xcrs::default();
        for (slot, (index, value)) in xcrs.xcrs.iter_mut().zip(&state.xcrs) {
            slot.xcr = *index;
            slot.value = *value;
            xcrs.nr_xcrs += 1;
        }
        self.check(
            "set the extended control registers",
            self.fd.set_xcrs(&xcrs),
        )?;
        // SAFETY: KVM reads more than the structure only if the process has asked for state that is enabled by request
        // (arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM)), and this one never does.
        let set = unsafe { self.fd.set_xsave(&state.xsave) };
        self.check("set the extended state", set)?;
        self.check(
            "set the debug registers",
            self.fd.set_debug_regs(&state.debug_regs),
        )?;
        self.check("set the local APIC", self.fd.set_lapic(&state.lapic))?;
        // After the local APIC, whose mode decides whether the deadline timer can be set.
        self.set_msrs(&state.msrs)?;
        self.check(
            "set the pending events",
            self.fd.set_vcpu_events(&state.events),
        )
    }

    /// Reads every register of the model that this vCPU has.
    fn get_msrs(&self) -> Result<Vec<(u32, u64)>, Error> {
        let mut values = Vec::with_capacity(self.msrs.len());
        let mut rest = self.msrs.as_slice();
        while !rest.is_empty() {
            let entries: Vec<_> = rest
                .iter()
                .take(KVM_MAX_MSR_ENTRIES)
                .map(|index| kvm_msr_entry {
                    index: *index,
                    ..Default::default()
                })
                .collect();
            let mut msrs = Msrs::from_entries(&entries).expect("no more than fit");
            let count = self.check(
                "read the model-specific registers",
                self.fd.get_msrs(&mut msrs),
            )?;
            values.extend(
                msrs.as_slice()
                    .iter()
                    .take(count)
                    .map(|entry| (entry.index, entry.data)),
            );
            // KVM stops at one that is in its list for all processors, but not in this one's CPUID: it has no state.
            let skipped = usize::from(count < entries.len());
            rest = &rest[count + skipped..];
        }
        Ok(values)
    }

    fn set_msrs(&self, values: &[(u32, u64)]) -> Result<(), Error> {
        for chunk in values.chunks(KVM_MAX_MSR_ENTRIES) {
            let entries: Vec<_> = chunk
                .iter()
                .map(|(index, data)| kvm_msr_entry {
                    index: *index,
                    data: *data,
                    ..Default::default()
                })
                .collect();
            let msrs = Msrs::from_entries(&entries).expect("no more than fit");
            let count = self.check("set the model-specific registers", self.fd.set_msrs(&msrs))?;
            if let Some((index, _)) = chunk.get(count) {
                return Err(Error::Msr {
                    vcpu: self.index,
                    index: *index,
                });
            }
        }
        Ok(())
    }

    fn check<T>(
        &self,
        operation: &'static str,
        result: Result<T, errno::Error>,
    ) -> Result<T, Error> {
        result.map_err(|source| Error::Vcpu {
            vcpu: self.index,
            operation,
            source,
        })
    }

    /// Adds what KVM says about an exit that it could not handle.
    pub(in super::super) fn explain(&mut self, mut message: String) -> String {
        let run = self.fd.get_kvm_run();
        if run.exit_reason == KVM_EXIT_INTERNAL_ERROR {
            // SAFETY: the exit reason names the member of the union that KVM has filled.
            let internal = unsafe { run.__bindgen_anon_1.internal };
            let _ = write!(message, " (suberror {}", internal.suberror);
            let count = usize::try_from(internal.ndata).unwrap_or(usize::MAX);
            for word in internal.data.iter().take(count) {
                let _ = write!(message, " {word:#x}");
            }
            message.push(')');
        }
        message
    }

    /// One line for whoever has to find out why a guest died.
    pub(in super::super) fn dump(&self) -> String {
        match (self.fd.get_regs(), self.fd.get_sregs()) {
            (Ok(r), Ok(s)) => format!(
                "vCPU {}: rip={:#x} rsp={:#x} rflags={:#x} rax={:#x} rbx={:#x} rcx={:#x} rdx={:#x} rsi={:#x} rdi={:#x} \
                 rbp={:#x} cs={:#x} cr0={:#x} cr2={:#x} cr3={:#x} cr4={:#x} efer={:#x}",
                self.index,
                r.rip,
                r.rsp,
                r.rflags,
                r.rax,
                r.rbx,
                r.rcx,
                r.rdx,
                r.rsi,
                r.rdi,
                r.rbp,
                s.cs.selector,
                s.cr0,
                s.cr2,
                s.cr3,
                s.cr4,
                s.efer
            ),
            _ => format!("vCPU {}: its registers cannot be read", self.index),
        }
    }
}

/// Flat 64-bit segments over the descriptor table and page tables that `boot` has written.
pub(crate) fn set_long_mode(sregs: &mut kvm_sregs) {
    let data = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: BOOT_DS,
        type_: 0x3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment {
        selector: BOOT_CS,
        type_: 0xb,
        db: 0,
        l: 1,
        ..data
    };
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    sregs.gdt = kvm_dtable {
        base: GDT_BASE,
        limit: u16::try_from(size_of_val(&GDT) - 1).expect("four descriptors"),
        ..Default::default()
    };
    sregs.cr0 |= CR0_PE | CR0_PG;
    sregs.cr3 = PAGE_TABLES_BASE;
    sregs.cr4 |= CR4_PAE;
    sregs.efer |= EFER_LME | EFER_LMA;
}
