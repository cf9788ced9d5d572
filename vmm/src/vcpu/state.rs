//! The thread of a vCPU.
//!
//! ```text
//! Paused ──Run──► Running ──Pause, or the guest has ended──► Paused
//!    └── orders closed ──► Finished ◄── orders closed ──┘
//! ```
//!
//! Orders come by channel and each is answered once. They are read between two entries to the guest; a sender kicks the
//! thread so that this happens at once. KVM finishes the instruction that caused an exit before it answers a kick
//! (Documentation/virt/kvm/api.rst, KVM_RUN), so the registers of a paused vCPU are those between two instructions.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};

use vm_memory::GuestAddress;

use super::Surroundings;
use super::arch::x86_64::{Registers, VcpuState};
use super::exit::{self, ExitCounters, ExitKind, Next};
use super::kick::Kickable;
use crate::control::ExitReason;
use crate::error::Error;

/// What the owner may ask.
#[derive(Debug)]
pub(super) enum Order {
    /// Start at the kernel's entry point once it runs.
    BootAt(GuestAddress),
    Run,
    Pause,
    Save,
    Restore(Box<VcpuState>),
}

/// The answers.
#[derive(Debug)]
pub(super) enum Answer {
    Done(Result<(), Error>),
    State(Result<Box<VcpuState>, Error>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Paused,
    Running,
    Finished,
}

/// What lives on the thread.
#[derive(Debug)]
pub(super) struct Runner {
    registers: Registers,
    surroundings: Surroundings,
    counters: Arc<ExitCounters>,
    orders: Receiver<Order>,
    answers: Sender<Answer>,
}

impl Runner {
    pub(super) fn new(
        registers: Registers,
        surroundings: Surroundings,
        counters: Arc<ExitCounters>,
        orders: Receiver<Order>,
        answers: Sender<Answer>,
    ) -> Self {
        Self {
            registers,
            surroundings,
            counters,
            orders,
            answers,
        }
    }

    /// The thread's life.
    pub(super) fn run(mut self) {
        // SAFETY: the page is mapped as long as the descriptor in self lives, and this guard is dropped before self.
        let kickable = unsafe { Kickable::new(self.registers.shared_page()) };
        let mut state = State::Paused;
        while state != State::Finished {
            state = match state {
                State::Paused => self.paused(),
                State::Running => self.running(),
                State::Finished => State::Finished,
            };
        }
        drop(kickable);
    }

    /// Reports that this vCPU cannot work at all.
    pub(super) fn fail(&self, message: &str) {
        self.surroundings.end.report(ExitReason::VcpuFailed {
            vcpu: self.registers.index(),
            message: message.to_owned(),
        });
    }

    /// Waits for an order.
    fn paused(&mut self) -> State {
        match self.orders.recv() {
            Ok(order) => self.obey(order, State::Paused),
            Err(_) => State::Finished,
        }
    }

    /// Runs the guest until an order comes or the guest ends.
    fn running(&mut self) -> State {
        if self.surroundings.end.is_reported() {
            return State::Paused;
        }
        match self.enter() {
            Next::Enter => State::Running,
            Next::Orders => match self.orders.try_recv() {
                Ok(order) => self.obey(order, State::Running),
                Err(TryRecvError::Empty) => State::Running,
                Err(TryRecvError::Disconnected) => State::Finished,
            },
            Next::End(reason) => {
                if reason == ExitReason::TripleFault {
                    log::warn!("{}", self.registers.dump());
                }
                self.surroundings.end.report(reason);
                State::Paused
            }
            Next::Fail(message) => {
                log::error!("{message}; {}", self.registers.dump());
                self.fail(&message);
                State::Paused
            }
        }
    }

    /// Enters the guest once and serves the exit.
    fn enter(&mut self) -> Next {
        match self.registers.run() {
            Ok(exit) => {
                self.counters.count(ExitKind::of(&exit));
                match exit::handle(&self.surroundings.buses, exit) {
                    Next::Fail(message) => Next::Fail(self.registers.explain(message)),
                    next => next,
                }
            }
            Err(err) if matches!(err.errno(), libc::EINTR | libc::EAGAIN) => {
                self.counters.count(ExitKind::Interrupted);
                self.registers.clear_immediate_exit();
                Next::Orders
            }
            Err(err) => {
                self.counters.count(ExitKind::Failed);
                Next::Fail(format!("KVM_RUN failed: {err}"))
            }
        }
    }

    /// Carries out one order and answers it.
    fn obey(&mut self, order: Order, now: State) -> State {
        let (answer, next) = match order {
            Order::Run => (Answer::Done(Ok(())), State::Running),
            Order::Pause => (Answer::Done(Ok(())), State::Paused),
            Order::BootAt(entry) => (Answer::Done(self.registers.boot_at(entry)), now),
            Order::Save => (Answer::State(self.registers.save().map(Box::new)), now),
            Order::Restore(state) => (Answer::Done(self.registers.restore(&state)), now),
        };
        match self.answers.send(answer) {
            Ok(()) => next,
            Err(_) => State::Finished,
        }
    }
}
