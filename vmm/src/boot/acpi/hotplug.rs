//! How the guest hears of what comes and goes: the generic event device (ACPI 6.5, 5.6.9) interrupts, and its method has each
//! kind of thing looked through. Each has a block of registers, of which one names what has come and one what shall go,
//! and a method that notifies the devices so named.

use acpi_tables::Aml;
use acpi_tables::AmlSink;
use acpi_tables::aml::{
    self, Arg, Device, Equal, If, Local, Method, MethodCall, Name, NotEqual, Notify, Path,
    ResourceTemplate, Store, While,
};

use crate::layout::HOTPLUG_GSI;
use crate::platform::NONE;

/// Values of Notify (5.6.6).
const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;

/// The generic event device.
#[derive(Default)]
pub(super) struct EventDevice {
    /// The methods that it calls; without any there is no device.
    pub(super) scans: Vec<&'static str>,
}

impl Aml for EventDevice {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        if self.scans.is_empty() {
            return;
        }
        let calls: Vec<_> = self
            .scans
            .iter()
            .map(|scan| MethodCall::new((*scan).into(), vec![]))
            .collect();
        let calls = calls.iter().map(|call| call as &dyn Aml).collect();
        Device::new(
            "GED0".into(),
            vec![
                &Name::new("_HID".into(), &"ACPI0013"),
                &Name::new("_UID".into(), &aml::ZERO),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![&aml::Interrupt::new(
                        true,
                        true,
                        false,
                        false,
                        HOTPLUG_GSI,
                    )]),
                ),
                &Method::new("_EVT".into(), 1, true, calls),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// The method that notifies everything that two registers name.
pub(super) struct Scan {
    pub(super) name: &'static str,
    /// The register that names what has come.
    pub(super) come: &'static str,
    /// The register that names what shall go.
    pub(super) to_go: &'static str,
    /// The [`NotifyOne`].
    pub(super) notify: &'static str,
}

impl Aml for Scan {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let all = |register, value| NotifyAll {
            register,
            notify: self.notify,
            value,
        };
        Method::new(
            self.name.into(),
            0,
            true,
            vec![
                &all(self.come, DEVICE_CHECK),
                &all(self.to_go, EJECT_REQUEST),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// Notifies one after the other of those that a register names, until it names none.
struct NotifyAll {
    register: &'static str,
    notify: &'static str,
    value: u8,
}

impl Aml for NotifyAll {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let register = Path::new(self.register);
        let next = Store::new(&Local(0), &register);
        next.to_aml_bytes(sink);
        While::new(
            &NotEqual::new(&Local(0), &NONE),
            vec![
                &MethodCall::new(self.notify.into(), vec![&Local(0), &self.value]),
                &next,
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// The method that notifies the device with the number of its first argument of the second.
pub(super) struct NotifyOne {
    pub(super) name: &'static str,
    /// By number.
    pub(super) devices: Vec<(u8, Path)>,
}

impl Aml for NotifyOne {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let tests: Vec<_> = self
            .devices
            .iter()
            .map(|(number, path)| (Equal::new(&Arg(0), number), Notify::new(path, &Arg(1))))
            .collect();
        let cases: Vec<_> = tests
            .iter()
            .map(|(equal, notify)| If::new(equal, vec![notify]))
            .collect();
        let cases = cases.iter().map(|case| case as &dyn Aml).collect();
        Method::new(self.name.into(), 2, true, cases).to_aml_bytes(sink);
    }
}

/// The path of something that [`numbered`] has named.
pub(super) fn path_of(prefix: &str, name: [u8; 4]) -> Path {
    let name = std::str::from_utf8(&name).expect("a letter and three digits");
    Path::new(&format!("{prefix}{name}"))
}

/// A name with a number: a letter and three digits.
pub(super) fn numbered(letter: u8, number: u8) -> [u8; 4] {
    let digit = |value: u8| b'0' + value % 10;
    [
        letter,
        digit(number / 100),
        digit(number / 10),
        digit(number),
    ]
}
