//! MSI-X: the table of messages that the guest programs, and the vectors that send them (PCI 3.0, 6.8.2).

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::error::Error;
use crate::irq::{Interrupts, MsiInterrupt, MsiMessage};

/// Capability id.
pub(super) const CAPABILITY_ID: u8 = 0x11;
/// Message control, in the capability after id and next: the guest may write these bits.
pub(super) const CONTROL_ENABLE: u16 = 1 << 15;
pub(super) const CONTROL_FUNCTION_MASK: u16 = 1 << 14;

/// Bytes of a table entry.
pub(super) const ENTRY_SIZE: usize = 16;
const WORDS: usize = ENTRY_SIZE / 4;
/// Vector control, the last word of an entry.
const CONTROL_WORD: usize = 3;
const VECTOR_MASKED: u32 = 1 << 0;

/// An entry as it is after a reset: masked.
const RESET_ENTRY: [u32; WORDS] = [0, 0, 0, VECTOR_MASKED];

#[derive(Debug)]
struct Vector {
    /// Address low, address high, data, control.
    entry: [u32; WORDS],
    /// Raised while it could not be sent.
    pending: bool,
    interrupt: MsiInterrupt,
}

impl Vector {
    fn message(&self) -> MsiMessage {
        let [low, high, data, _] = self.entry;
        MsiMessage {
            address: u64::from(high) << 32 | u64::from(low),
            data,
        }
    }
}

/// An eventfd by which somebody outside of this process raises a vector. While that cannot send, the eventfd is not
/// connected, and holds what is pending.
#[derive(Debug)]
struct Call {
    event: EventFd,
    /// The vector that it raises; there may be none of this number.
    vector: u16,
    connected: bool,
}

impl Call {
    fn connect(&mut self, interrupt: &MsiInterrupt) {
        if self.connected {
            return;
        }
        match interrupt.bind(&self.event) {
            Ok(()) => self.connected = true,
            Err(err) => log::error!("an interrupt of the guest is lost: {err}"),
        }
    }

    fn disconnect(&mut self, interrupt: &MsiInterrupt) {
        if std::mem::take(&mut self.connected) {
            interrupt.unbind(&self.event);
        }
    }

    fn is_pending(&self) -> bool {
        !self.connected && is_readable(&self.event)
    }
}

/// Whether an eventfd was written to, and not read since.
fn is_readable(event: &EventFd) -> bool {
    let mut descriptor = libc::pollfd {
        fd: event.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one pollfd, which outlives the call.
    unsafe { libc::poll(&raw mut descriptor, 1, 0) == 1 }
}

#[derive(Debug)]
struct Table {
    enabled: bool,
    function_masked: bool,
    vectors: Vec<Vector>,
    /// By queue.
    calls: BTreeMap<u16, Call>,
}

impl Table {
    fn can_send(&self, vector: &Vector) -> bool {
        self.enabled && !self.function_masked && vector.entry[CONTROL_WORD] & VECTOR_MASKED == 0
    }

    /// After a change of a mask or a message: tells KVM the message, and sends what was held back.
    fn refresh(&mut self, index: usize) {
        let can_send = self.can_send(&self.vectors[index]);
        let vector = &mut self.vectors[index];
        let calls = self
            .calls
            .values_mut()
            .filter(|call| usize::from(call.vector) == index);
        if !can_send {
            calls.for_each(|call| call.disconnect(&vector.interrupt));
            return;
        }
        if let Err(err) = vector.interrupt.route(vector.message()) {
            log::error!("an interrupt of the guest is lost: {err}");
            return;
        }
        calls.for_each(|call| call.connect(&vector.interrupt));
        if std::mem::take(&mut vector.pending) {
            vector.interrupt.raise();
        }
    }

    /// Connects a call to the vector that it shall raise, if that can send.
    fn connect_call(&mut self, queue: u16) {
        if let Some(call) = self.calls.get(&queue)
            && usize::from(call.vector) < self.vectors.len()
        {
            self.refresh(call.vector.into());
        }
    }

    fn disconnect_call(&mut self, queue: u16) {
        if let Some(call) = self.calls.get_mut(&queue)
            && let Some(vector) = self.vectors.get(usize::from(call.vector))
        {
            call.disconnect(&vector.interrupt);
        }
    }

    fn drop_calls(&mut self) {
        for (_, mut call) in std::mem::take(&mut self.calls) {
            if let Some(vector) = self.vectors.get(usize::from(call.vector)) {
                call.disconnect(&vector.interrupt);
            }
        }
    }

    fn is_pending(&self, index: usize) -> bool {
        self.vectors[index].pending
            || self
                .calls
                .values()
                .any(|call| usize::from(call.vector) == index && call.is_pending())
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        self.drop_calls();
    }
}

/// The vectors of one function. Devices raise them from their threads while vCPUs program them.
#[derive(Debug)]
pub(super) struct Msix {
    table: Mutex<Table>,
}

/// The state of the table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MsixState {
    enabled: bool,
    function_masked: bool,
    entries: Vec<[u32; WORDS]>,
    pending: Vec<bool>,
}

impl Msix {
    pub(super) fn new(interrupts: &Arc<Interrupts>, vectors: usize) -> Result<Self, Error> {
        let vectors = (0..vectors)
            .map(|_| {
                Ok(Vector {
                    entry: RESET_ENTRY,
                    pending: false,
                    interrupt: interrupts.message()?,
                })
            })
            .collect::<Result<_, Error>>()?;
        Ok(Self {
            table: Mutex::new(Table {
                enabled: false,
                function_masked: false,
                vectors,
                calls: BTreeMap::new(),
            }),
        })
    }

    /// Sends a message, or remembers that it is due. Returns whether MSI-X is what the guest uses.
    pub(super) fn raise(&self, vector: u16) -> bool {
        let mut table = self.lock();
        let index = usize::from(vector);
        if let Some(vector) = table.vectors.get(index) {
            if table.can_send(vector) {
                vector.interrupt.raise();
            } else {
                table.vectors[index].pending = true;
            }
        }
        table.enabled
    }

    /// The eventfd by which somebody else raises `vector` for `queue`, the same one until [`Self::drop_calls`].
    pub(super) fn call(&self, queue: u16, vector: u16) -> io::Result<EventFd> {
        let mut table = self.lock();
        if let Some(call) = table.calls.get(&queue) {
            return call.event.try_clone();
        }
        let event = EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)?;
        let copy = event.try_clone()?;
        let call = Call {
            event,
            vector,
            connected: false,
        };
        table.calls.insert(queue, call);
        table.connect_call(queue);
        Ok(copy)
    }

    /// The guest has chosen another vector for `queue`: its call follows, if it has one.
    pub(super) fn move_call(&self, queue: u16, vector: u16) {
        let mut table = self.lock();
        table.disconnect_call(queue);
        if let Some(call) = table.calls.get_mut(&queue) {
            call.vector = vector;
        }
        table.connect_call(queue);
    }

    /// Forgets all calls.
    pub(super) fn drop_calls(&self) {
        self.lock().drop_calls();
    }

    /// The guest has written message control.
    pub(super) fn set_control(&self, control: u16) {
        let mut table = self.lock();
        table.enabled = control & CONTROL_ENABLE != 0;
        table.function_masked = control & CONTROL_FUNCTION_MASK != 0;
        for index in 0..table.vectors.len() {
            table.refresh(index);
        }
    }

    /// A load from the table. Only aligned words and pairs of words mean anything (6.8.2).
    pub(super) fn read_table(&self, offset: usize, data: &mut [u8]) {
        data.fill(0);
        if !is_aligned_word(offset, data.len()) {
            return;
        }
        let table = self.lock();
        for (word, bytes) in (offset / 4..).zip(data.chunks_exact_mut(4)) {
            if let Some(vector) = table.vectors.get(word / WORDS) {
                bytes.copy_from_slice(&vector.entry[word % WORDS].to_le_bytes());
            }
        }
    }

    /// A store to the table.
    pub(super) fn write_table(&self, offset: usize, data: &[u8]) {
        if !is_aligned_word(offset, data.len()) {
            return;
        }
        let mut table = self.lock();
        for (word, bytes) in (offset / 4..).zip(data.chunks_exact(4)) {
            let value = u32::from_le_bytes(bytes.try_into().expect("chunks of four"));
            if let Some(vector) = table.vectors.get_mut(word / WORDS) {
                vector.entry[word % WORDS] = value;
                table.refresh(word / WORDS);
            }
        }
    }

    /// A load from the array of pending bits.
    pub(super) fn read_pending(&self, offset: usize, data: &mut [u8]) {
        let table = self.lock();
        for (at, byte) in (offset..).zip(data) {
            let vectors = (at.saturating_mul(8)..table.vectors.len()).take(8);
            *byte = vectors.enumerate().fold(0, |bits, (bit, vector)| {
                bits | u8::from(table.is_pending(vector)) << bit
            });
        }
    }

    pub(super) fn save(&self) -> MsixState {
        let table = self.lock();
        MsixState {
            enabled: table.enabled,
            function_masked: table.function_masked,
            entries: table.vectors.iter().map(|vector| vector.entry).collect(),
            pending: (0..table.vectors.len())
                .map(|vector| table.is_pending(vector))
                .collect(),
        }
    }

    /// `None` if the state is not one of a table of this size.
    pub(super) fn restore(&self, state: &MsixState) -> Option<()> {
        let mut table = self.lock();
        let count = table.vectors.len();
        if state.entries.len() != count || state.pending.len() != count {
            return None;
        }
        table.enabled = state.enabled;
        table.function_masked = state.function_masked;
        for index in 0..count {
            table.vectors[index].entry = state.entries[index];
            table.vectors[index].pending = state.pending[index];
            table.refresh(index);
        }
        Some(())
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_aligned_word(offset: usize, len: usize) -> bool {
    matches!(len, 4 | 8) && offset.is_multiple_of(len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::testing::FakeHypervisor;

    fn msix() -> (Msix, Arc<FakeHypervisor>) {
        let fake = Arc::new(FakeHypervisor::default());
        let msix = Msix::new(&Interrupts::new(fake.clone()), 3).unwrap();
        (msix, fake)
    }

    fn program(msix: &Msix, vector: usize, data: u32) {
        let at = vector * ENTRY_SIZE;
        msix.write_table(at, &0xfee0_0000u64.to_le_bytes());
        msix.write_table(at + 8, &data.to_le_bytes());
        msix.write_table(at + 12, &0u32.to_le_bytes());
    }

    /// How often the vector's message was sent.
    fn sent(msix: &Msix, vector: usize) -> u64 {
        let table = msix.lock();
        table.vectors[vector].interrupt.event().read().unwrap_or(0)
    }

    fn pending(msix: &Msix) -> u8 {
        let mut data = [0xff; 8];
        msix.read_pending(0, &mut data);
        assert_eq!(data[1..], [0; 7]);
        data[0]
    }

    #[test]
    fn an_unmasked_vector_is_sent() {
        let (msix, fake) = msix();
        program(&msix, 1, 0x31);
        assert!(fake.irqfds().is_empty(), "MSI-X is not enabled yet");
        msix.set_control(CONTROL_ENABLE);
        assert_eq!(fake.irqfds().len(), 1);
        assert!(msix.raise(1));
        assert_eq!(sent(&msix, 1), 1);
        assert_eq!(pending(&msix), 0);
    }

    #[test]
    fn a_masked_vector_is_pending_until_unmasked() {
        let (msix, _) = msix();
        program(&msix, 2, 0x31);
        msix.set_control(CONTROL_ENABLE);
        msix.write_table(2 * ENTRY_SIZE + 12, &VECTOR_MASKED.to_le_bytes());
        msix.raise(2);
        msix.raise(2);
        assert_eq!((sent(&msix, 2), pending(&msix)), (0, 0b100));
        msix.write_table(2 * ENTRY_SIZE + 12, &0u32.to_le_bytes());
        assert_eq!((sent(&msix, 2), pending(&msix)), (1, 0));
    }

    #[test]
    fn the_function_mask_holds_all_back() {
        let (msix, _) = msix();
        program(&msix, 0, 1);
        program(&msix, 1, 2);
        msix.set_control(CONTROL_ENABLE | CONTROL_FUNCTION_MASK);
        msix.raise(0);
        msix.raise(1);
        assert_eq!(pending(&msix), 0b11);
        msix.set_control(CONTROL_ENABLE);
        assert_eq!((sent(&msix, 0), sent(&msix, 1)), (1, 1));
    }

    #[test]
    fn without_msix_nothing_is_sent_and_the_caller_learns_it() {
        let (msix, _) = msix();
        assert!(!msix.raise(0));
        assert!(!msix.raise(0xffff));
    }

    #[test]
    fn misaligned_and_distant_accesses_do_nothing() {
        let (msix, _) = msix();
        for (offset, len) in [
            (1, 4),
            (4, 8),
            (0, 1),
            (0, 2),
            (3 * ENTRY_SIZE, 8),
            (4096, 4),
        ] {
            msix.write_table(offset, &vec![0; len]);
            let mut data = vec![0xee; len];
            msix.read_table(offset, &mut data);
            assert_eq!(data, vec![0; len]);
        }
        assert!(msix.lock().vectors.iter().all(|v| v.entry == RESET_ENTRY));
        msix.read_pending(4088, &mut [0; 8]);
    }

    #[test]
    fn a_call_is_connected_while_its_vector_can_send() {
        let (msix, fake) = msix();
        program(&msix, 1, 0x31);
        let event = msix.call(0, 1).unwrap();
        assert!(fake.irqfds().is_empty());
        msix.set_control(CONTROL_ENABLE);
        assert_eq!(fake.irqfds(), [25, 25]);
        // The same one again.
        msix.call(0, 1).unwrap().write(1).unwrap();
        assert_eq!(event.read().unwrap(), 1);

        msix.write_table(ENTRY_SIZE + 12, &VECTOR_MASKED.to_le_bytes());
        assert_eq!(fake.irqfds(), [25]);
        assert_eq!(pending(&msix), 0);
        event.write(1).unwrap();
        assert_eq!(pending(&msix), 0b10);
        assert_eq!(msix.save().pending, [false, true, false]);
        // KVM takes what is pending when it is connected again.
        msix.write_table(ENTRY_SIZE + 12, &0u32.to_le_bytes());
        assert_eq!(fake.irqfds(), [25, 25]);
        assert_eq!(pending(&msix), 0);

        msix.drop_calls();
        assert_eq!(fake.irqfds(), [25]);
    }

    #[test]
    fn a_call_follows_its_queue_to_another_vector() {
        let (msix, fake) = msix();
        program(&msix, 1, 0x31);
        program(&msix, 2, 0x32);
        msix.set_control(CONTROL_ENABLE);
        msix.call(0, 1).unwrap();
        msix.call(7, 1).unwrap();
        assert_eq!(fake.irqfds(), [25, 25, 25, 26]);
        msix.move_call(7, 2);
        assert_eq!(fake.irqfds(), [25, 25, 26, 26]);
        // No vector, as after a reset, or one that is masked.
        msix.move_call(0, 0xffff);
        assert_eq!(fake.irqfds(), [25, 26, 26]);
        msix.move_call(7, 0);
        assert_eq!(fake.irqfds(), [25, 26]);
        // A queue without a call.
        msix.move_call(3, 1);
        drop(msix);
        assert!(fake.irqfds().is_empty());
    }

    #[test]
    fn state_survives_save_and_restore() {
        let (msix, _) = msix();
        program(&msix, 0, 0x41);
        msix.raise(0);
        msix.raise(1);
        msix.set_control(CONTROL_ENABLE);
        let state = msix.save();
        let (other, fake) = self::msix();
        other.restore(&state).unwrap();
        assert_eq!(other.save(), state);
        assert_eq!(fake.irqfds().len(), 1);
        let mut short = state;
        short.pending.pop();
        assert!(other.restore(&short).is_none());
    }
}
