//! A virtual processor: the handle by which the owner of the VM drives its thread.

mod arch;
mod exit;
mod kick;
mod state;

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};

use kvm_ioctls::VmFd;
use vm_memory::GuestAddress;

pub(crate) use self::arch::x86_64::{CpuModel, VcpuState, set_long_mode};
pub(crate) use self::exit::{ExitCounters, ExitKind};
use self::state::{Answer, Order, Runner};
use crate::bus::Buses;
use crate::end::End;
use crate::error::Error;

/// What the thread of a vCPU does before anything else: the VMM confines it here.
pub type VcpuSetup = fn() -> io::Result<()>;

/// One vCPU and its thread. Dropping it ends both.
#[derive(Debug)]
pub(crate) struct Vcpu {
    index: u8,
    /// `None` only while dropping: its end is the thread's order to finish.
    orders: Option<Sender<Order>>,
    answers: Receiver<Answer>,
    thread: Option<JoinHandle<()>>,
    counters: Arc<ExitCounters>,
}

/// What a vCPU needs of the VM around it.
#[derive(Debug, Clone)]
pub(crate) struct Surroundings {
    /// Where its accesses go.
    pub(crate) buses: Arc<Buses>,
    /// Where it reports that the guest has ended.
    pub(crate) end: Arc<End>,
    /// Confines its thread.
    pub(crate) setup: VcpuSetup,
}

impl Vcpu {
    /// Makes vCPU `index`, in the state after a reset of the machine, and its thread, paused.
    pub(crate) fn new(
        vm: &VmFd,
        index: u8,
        model: &CpuModel,
        surroundings: Surroundings,
    ) -> Result<Self, Error> {
        let fd = vm.create_vcpu(index.into()).map_err(|source| Error::Vcpu {
            vcpu: index,
            operation: "make the descriptor",
            source,
        })?;
        let registers = arch::x86_64::Registers::new(index, fd, model)?;
        let (orders, received) = channel();
        let (answer, answers) = channel();
        let counters = Arc::new(ExitCounters::default());
        let setup = surroundings.setup;
        let runner = Runner::new(
            registers,
            surroundings,
            Arc::clone(&counters),
            received,
            answer,
        );
        kick::install();
        let name = format!("vcpu-{index}");
        let thread = thread::Builder::new()
            .name(name.clone())
            .spawn(move || match setup() {
                Ok(()) => runner.run(),
                Err(err) => runner.fail(&format!("its thread cannot be confined: {err}")),
            })
            .map_err(|source| Error::SpawnThread { name, source })?;
        Ok(Self {
            index,
            orders: Some(orders),
            answers,
            thread: Some(thread),
            counters,
        })
    }

    /// Makes this the vCPU that starts at the kernel's 64-bit entry point. While paused.
    pub(crate) fn boot_at(&self, entry: GuestAddress) -> Result<(), Error> {
        match self.order(Order::BootAt(entry))? {
            Answer::Done(result) => result,
            Answer::State(_) => Err(Error::VcpuGone { vcpu: self.index }),
        }
    }

    /// Lets it run.
    pub(crate) fn resume(&self) -> Result<(), Error> {
        self.order(Order::Run).map(drop)
    }

    /// Takes it out of the guest; returns when it is.
    pub(crate) fn pause(&self) -> Result<(), Error> {
        self.order(Order::Pause).map(drop)
    }

    /// Copies its state. While paused.
    pub(crate) fn save(&self) -> Result<VcpuState, Error> {
        match self.order(Order::Save)? {
            Answer::State(state) => state.map(|state| *state),
            Answer::Done(_) => Err(Error::VcpuGone { vcpu: self.index }),
        }
    }

    /// Puts a state back. While paused.
    pub(crate) fn restore(&self, state: VcpuState) -> Result<(), Error> {
        match self.order(Order::Restore(Box::new(state)))? {
            Answer::Done(result) => result,
            Answer::State(_) => Err(Error::VcpuGone { vcpu: self.index }),
        }
    }

    pub(crate) fn counters(&self) -> &ExitCounters {
        &self.counters
    }

    /// Sends an order and waits for its answer.
    fn order(&self, order: Order) -> Result<Answer, Error> {
        let gone = Error::VcpuGone { vcpu: self.index };
        let orders = self.orders.as_ref().expect("present until dropped");
        if orders.send(order).is_err() {
            return Err(gone);
        }
        self.kick();
        self.answers.recv().map_err(|_| gone)
    }

    fn kick(&self) {
        if let Some(thread) = &self.thread {
            kick::kick(thread);
        }
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.orders = None;
        self.kick();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread of vCPU {} panicked", self.index);
        }
    }
}
