//! What an exit of a vCPU means: an access to a device, or an end.

use std::sync::atomic::{AtomicU64, Ordering};

use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::VcpuExit;

use crate::bus::Buses;
use crate::control::ExitReason;

/// The kinds of exits that are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ExitKind {
    IoIn,
    IoOut,
    MmioRead,
    MmioWrite,
    Shutdown,
    SystemEvent,
    /// A signal, or an event that asks for nothing.
    Interrupted,
    /// What should never happen.
    Failed,
}

impl ExitKind {
    /// All of them, in the order of their counters.
    pub(crate) const ALL: [Self; 8] = [
        Self::IoIn,
        Self::IoOut,
        Self::MmioRead,
        Self::MmioWrite,
        Self::Shutdown,
        Self::SystemEvent,
        Self::Interrupted,
        Self::Failed,
    ];

    /// Its name in metrics.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::IoIn => "io_in",
            Self::IoOut => "io_out",
            Self::MmioRead => "mmio_read",
            Self::MmioWrite => "mmio_write",
            Self::Shutdown => "shutdown",
            Self::SystemEvent => "system_event",
            Self::Interrupted => "interrupted",
            Self::Failed => "failed",
        }
    }

    /// Of an exit.
    pub(crate) fn of(exit: &VcpuExit<'_>) -> Self {
        match exit {
            VcpuExit::IoIn(..) => Self::IoIn,
            VcpuExit::IoOut(..) => Self::IoOut,
            VcpuExit::MmioRead(..) => Self::MmioRead,
            VcpuExit::MmioWrite(..) => Self::MmioWrite,
            VcpuExit::Shutdown => Self::Shutdown,
            VcpuExit::SystemEvent(..) => Self::SystemEvent,
            VcpuExit::Intr => Self::Interrupted,
            _ => Self::Failed,
        }
    }
}

/// How often a vCPU left the guest for this process, by kind.
#[derive(Debug, Default)]
pub(crate) struct ExitCounters([AtomicU64; ExitKind::ALL.len()]);

impl ExitCounters {
    pub(crate) fn count(&self, kind: ExitKind) {
        self.0[kind as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn get(&self, kind: ExitKind) -> u64 {
        self.0[kind as usize].load(Ordering::Relaxed)
    }
}

/// What is to be done after an exit.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Enter the guest again.
    Enter,
    /// Look for orders first.
    Orders,
    /// The guest has ended.
    End(ExitReason),
    /// KVM cannot go on, or did what it should not; with what is known of it.
    Fail(String),
}

/// Serves one exit.
pub(crate) fn handle(buses: &Buses, exit: VcpuExit<'_>) -> Next {
    match exit {
        VcpuExit::IoIn(port, data) => buses.ports.read(port.into(), data),
        VcpuExit::IoOut(port, data) => buses.ports.write(port.into(), data),
        VcpuExit::MmioRead(address, data) => buses.mmio.read(address, data),
        VcpuExit::MmioWrite(address, data) => buses.mmio.write(address, data),
        VcpuExit::Intr => return Next::Orders,
        VcpuExit::Shutdown => return Next::End(ExitReason::TripleFault),
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _) => {
            return Next::End(ExitReason::PowerOff);
        }
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => return Next::End(ExitReason::Reset),
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _) => return Next::End(ExitReason::Panic),
        VcpuExit::FailEntry(reason, cpu) => {
            return Next::Fail(format!(
                "the processor refused to enter the guest (reason {reason:#x}, host CPU {cpu})"
            ));
        }
        VcpuExit::InternalError => {
            return Next::Fail("KVM could not emulate an instruction of the guest".to_owned());
        }
        unexpected => return Next::Fail(format!("unexpected exit {unexpected:?}")),
    }
    Next::Enter
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::bus::testing::Recorder;

    fn buses() -> (Buses, Arc<Recorder>, Arc<Recorder>) {
        let mut buses = Buses::default();
        let ports = Arc::new(Recorder::default());
        let mmio = Arc::new(Recorder::default());
        buses.ports.attach(0x10..0x20, ports.clone()).unwrap();
        buses.mmio.attach(0x1000..0x2000, mmio.clone()).unwrap();
        (buses, ports, mmio)
    }

    #[test]
    fn port_and_memory_accesses_reach_their_own_bus() {
        let (buses, ports, mmio) = buses();
        let mut data = [0xee];
        assert_eq!(handle(&buses, VcpuExit::IoIn(0x13, &mut data)), Next::Enter);
        assert_eq!(data, [3]);
        assert_eq!(handle(&buses, VcpuExit::IoOut(0x11, &[7])), Next::Enter);
        let mut data = [0; 4];
        handle(&buses, VcpuExit::MmioRead(0x1005, &mut data));
        assert_eq!(data, [5; 4]);
        handle(&buses, VcpuExit::MmioWrite(0x1008, &[1, 2]));
        assert_eq!(*ports.writes.lock().unwrap(), [(1, vec![7])]);
        assert_eq!(*mmio.writes.lock().unwrap(), [(8, vec![1, 2])]);
    }

    #[test]
    fn reads_of_nothing_are_ones_and_writes_are_lost() {
        let (buses, ..) = buses();
        let mut data = [0; 2];
        handle(&buses, VcpuExit::IoIn(0x99, &mut data));
        assert_eq!(data, [0xff; 2]);
        assert_eq!(
            handle(&buses, VcpuExit::MmioWrite(u64::MAX, &[1])),
            Next::Enter
        );
    }

    #[test]
    fn ends_have_their_names() {
        let buses = Buses::default();
        let end_of = |exit| match handle(&buses, exit) {
            Next::End(reason) => reason,
            other => panic!("{other:?}"),
        };
        assert_eq!(end_of(VcpuExit::Shutdown), ExitReason::TripleFault);
        assert_eq!(
            end_of(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, &[])),
            ExitReason::PowerOff
        );
        assert_eq!(
            end_of(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, &[])),
            ExitReason::Reset
        );
        assert_eq!(
            end_of(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, &[])),
            ExitReason::Panic
        );
    }

    #[test]
    fn what_kvm_cannot_do_fails_with_a_sentence() {
        let buses = Buses::default();
        for exit in [
            VcpuExit::InternalError,
            VcpuExit::FailEntry(0x8000_0021, 3),
            VcpuExit::Hlt,
            VcpuExit::Unsupported(99),
        ] {
            assert!(matches!(handle(&buses, exit), Next::Fail(_)));
        }
        assert_eq!(handle(&buses, VcpuExit::Intr), Next::Orders);
    }

    #[test]
    fn every_kind_has_its_own_counter() {
        let counters = ExitCounters::default();
        for (index, kind) in ExitKind::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, index);
            counters.count(kind);
            assert_eq!(counters.get(kind), 1, "{}", kind.name());
        }
    }
}
