//! The serial port (16550A, from vm-superio): where the kernel's messages go before the virtio console is there.
//!
//! Output only: nobody types into it.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, SerialState as Registers, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::snapshot::RestoreError;

/// Counters of the serial port.
#[derive(Debug, Default)]
pub(crate) struct SerialMetrics {
    /// Bytes that were written out.
    pub(crate) bytes: AtomicU64,
    /// Bytes that were lost because nobody reads the other end.
    pub(crate) lost_bytes: AtomicU64,
}

impl SerialEvents for SerialMetrics {
    fn buffer_read(&self) {}

    fn out_byte(&self) {
        self.bytes.fetch_add(1, Ordering::Relaxed);
    }

    fn tx_lost_byte(&self) {
        self.lost_bytes.fetch_add(1, Ordering::Relaxed);
    }

    fn in_buffer_empty(&self) {}
}

/// The port's interrupt line.
#[derive(Debug)]
struct InterruptLine(Arc<EventFd>);

impl Trigger for InterruptLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

type Uart = Serial<InterruptLine, Arc<SerialMetrics>, Arc<File>>;

/// The serial port.
#[derive(Debug)]
pub(crate) struct SerialPort {
    uart: Mutex<Uart>,
    interrupt: Arc<EventFd>,
    metrics: Arc<SerialMetrics>,
    out: Arc<File>,
}

impl SerialPort {
    /// A port that writes to `out`, which must not block: a byte that it does not take at once is lost.
    pub(crate) fn new(interrupt: EventFd, out: File) -> Self {
        let interrupt = Arc::new(interrupt);
        let metrics = Arc::new(SerialMetrics::default());
        let out = Arc::new(out);
        let uart = Serial::with_events(
            InterruptLine(Arc::clone(&interrupt)),
            Arc::clone(&metrics),
            Arc::clone(&out),
        );
        Self {
            uart: Mutex::new(uart),
            interrupt,
            metrics,
            out,
        }
    }

    pub(crate) fn metrics(&self) -> &SerialMetrics {
        &self.metrics
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut uart = self.uart.lock().unwrap_or_else(PoisonError::into_inner);
        // A wide or repeated access is as many of one byte: no driver does the former, and the latter means the same
        // register each time.
        for byte in data {
            *byte = uart.read(register(offset));
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut uart = self.uart.lock().unwrap_or_else(PoisonError::into_inner);
        for byte in data {
            // The loss of a byte is counted above; an interrupt that cannot be raised is lost like one on a broken
            // line, and the driver polls.
            let _ = uart.write(register(offset), *byte);
        }
    }
}

fn register(offset: u64) -> u8 {
    u8::try_from(offset).expect("the bus keeps offsets within the eight ports")
}

/// The registers of the serial port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SerialState {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    in_buffer: Vec<u8>,
}

impl SerialPort {
    /// Copies the registers.
    pub(crate) fn save(&self) -> SerialState {
        let registers = self
            .uart
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .state();
        SerialState {
            baud_divisor_low: registers.baud_divisor_low,
            baud_divisor_high: registers.baud_divisor_high,
            interrupt_enable: registers.interrupt_enable,
            interrupt_identification: registers.interrupt_identification,
            line_control: registers.line_control,
            line_status: registers.line_status,
            modem_control: registers.modem_control,
            modem_status: registers.modem_status,
            scratch: registers.scratch,
            in_buffer: registers.in_buffer,
        }
    }

    /// Puts a copy of the registers back. On failure the port is as it was.
    pub(crate) fn restore(&self, state: SerialState) -> Result<(), RestoreError> {
        let registers = Registers {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer,
        };
        let uart = Serial::from_state(
            &registers,
            InterruptLine(Arc::clone(&self.interrupt)),
            Arc::clone(&self.metrics),
            Arc::clone(&self.out),
        )
        .map_err(|err| RestoreError {
            device: "serial port",
            reason: format!("{err:?}"),
        })?;
        *self.uart.lock().unwrap_or_else(PoisonError::into_inner) = uart;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek};

    use super::*;

    fn port() -> (SerialPort, File) {
        let file = tempfile::tempfile().unwrap();
        let interrupt = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        (SerialPort::new(interrupt, file.try_clone().unwrap()), file)
    }

    #[test]
    fn what_is_written_comes_out() {
        let (port, mut file) = port();
        port.write(0, b"ab");
        port.write(0, b"c");
        file.rewind().unwrap();
        let mut out = String::new();
        file.read_to_string(&mut out).unwrap();
        assert_eq!(out, "abc");
        assert_eq!(port.metrics().bytes.load(Ordering::Relaxed), 3);
    }

    #[test]
    fn a_full_pipe_loses_bytes_and_does_not_block() {
        let (reader, writer) = pipe();
        drop(reader);
        let port = SerialPort::new(EventFd::new(0).unwrap(), writer);
        port.write(0, b"xyz");
        assert_eq!(port.metrics().lost_bytes.load(Ordering::Relaxed), 3);
    }

    fn pipe() -> (File, File) {
        let (reader, writer) = std::io::pipe().unwrap();
        (
            File::from(std::os::fd::OwnedFd::from(reader)),
            File::from(std::os::fd::OwnedFd::from(writer)),
        )
    }

    #[test]
    fn state_survives_save_and_restore() {
        let (port, _) = port();
        port.write(3, &[0x83]);
        port.write(0, &[0x0c]);
        port.write(7, &[0x5a]);
        let state = port.save();
        let text = serde_json::to_string(&state).unwrap();
        let (other, _) = self::port();
        other.restore(serde_json::from_str(&text).unwrap()).unwrap();
        assert_eq!(other.save(), state);
        let mut divisor = [0];
        other.read(0, &mut divisor);
        assert_eq!(divisor, [0x0c]);
    }

    #[test]
    fn a_state_with_too_long_an_input_is_refused() {
        let (port, _) = port();
        let before = port.save();
        let mut state = port.save();
        state.in_buffer = vec![0; 1000];
        assert!(port.restore(state).is_err());
        assert_eq!(port.save(), before);
    }
}
