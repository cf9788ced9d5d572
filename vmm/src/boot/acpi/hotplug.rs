//! How the guest hears of vCPUs that come and go: the generic event device (ACPI 6.5, 5.6.9) interrupts, its method asks the
//! registers of [`crate::platform::hotplug`] what has changed, and notifies the devices concerned. They answer the rest:
//! `_STA` whether they are there, `_MAT` their local APIC, and `_EJ0` lets go of them.

use acpi_tables::Aml;
use acpi_tables::AmlSink;
use acpi_tables::aml::{
    self, Arg, BufferData, Device, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule,
    FieldUpdateRule, If, Local, Method, MethodCall, Name, NotEqual, Notify, OpRegion,
    OpRegionSpace, Path, ResourceTemplate, Return, Store, While,
};
use acpi_tables::madt::{EnabledStatus, ProcessorLocalApic};

use super::{low_word, port_count};
use crate::layout::{HOTPLUG_GSI, HOTPLUG_PORTS};
use crate::platform::hotplug::{NONE, PRESENT_BYTES};

/// Values of Notify (5.6.6).
const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;
/// `_STA` of a device that is there: present, enabled, shown, working (6.3.7).
const STATUS_PRESENT: u8 = 0xf;

/// The generic event device, and the registers with the methods that read them.
pub(super) struct HotplugController {
    pub(super) max_vcpus: u8,
}

impl Aml for HotplugController {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
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
                &Method::new(
                    "_EVT".into(),
                    1,
                    true,
                    vec![&MethodCall::new("\\_SB_.HPLG.SCAN".into(), vec![])],
                ),
            ],
        )
        .to_aml_bytes(sink);

        let base = low_word(HOTPLUG_PORTS.start);
        let count = port_count(&HOTPLUG_PORTS);
        Device::new(
            "HPLG".into(),
            vec![
                &Name::new("_HID".into(), &aml::EISAName::new("PNP0A06")),
                &Name::new("_UID".into(), &"hotplug"),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![&aml::IO::new(base, base, 0, count)]),
                ),
                &OpRegion::new("REGS".into(), OpRegionSpace::SystemIO, &base, &count),
                &self.registers(),
                &NotifyVcpu {
                    count: self.max_vcpus,
                },
                &Method::new(
                    "SCAN".into(),
                    0,
                    true,
                    vec![
                        &NotifyAll {
                            register: "CINS",
                            value: DEVICE_CHECK,
                        },
                        &NotifyAll {
                            register: "CREM",
                            value: EJECT_REQUEST,
                        },
                    ],
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

impl HotplugController {
    /// The layout that [`crate::platform::hotplug`] describes.
    fn registers(&self) -> Field {
        let vcpus = usize::from(self.max_vcpus);
        let mut fields: Vec<_> = (0..self.max_vcpus)
            .map(|index| FieldEntry::Named(name(b'P', index), 1))
            .collect();
        fields.push(FieldEntry::Reserved(PRESENT_BYTES * 8 - vcpus));
        fields.extend([
            FieldEntry::Named(*b"CINS", 8),
            FieldEntry::Named(*b"CREM", 8),
            FieldEntry::Named(*b"CEJE", 8),
        ]);
        Field::new(
            "REGS".into(),
            FieldAccessType::Byte,
            FieldLockRule::NoLock,
            FieldUpdateRule::WriteAsZeroes,
            fields,
        )
    }
}

/// Notifies vCPU after vCPU that a register names, until it names none.
struct NotifyAll {
    register: &'static str,
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
                &MethodCall::new("CNTF".into(), vec![&Local(0), &self.value]),
                &next,
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// The method that notifies the vCPU with the number of its first argument of the second.
struct NotifyVcpu {
    count: u8,
}

impl Aml for NotifyVcpu {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let paths: Vec<_> = (0..self.count).map(vcpu_path).collect();
        let notify: Vec<_> = paths
            .iter()
            .map(|path| Notify::new(path, &Arg(1)))
            .collect();
        let equal: Vec<_> = (0..self.count).collect();
        let equal: Vec<_> = equal
            .iter()
            .map(|index| Equal::new(&Arg(0), index))
            .collect();
        let cases: Vec<_> = equal
            .iter()
            .zip(&notify)
            .map(|(equal, notify)| If::new(equal, vec![notify]))
            .collect();
        let cases = cases.iter().map(|case| case as &dyn Aml).collect();
        Method::new("CNTF".into(), 2, true, cases).to_aml_bytes(sink);
    }
}

/// A device for each vCPU that there may be.
pub(super) struct Processors {
    pub(super) count: u8,
}

impl Aml for Processors {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        for index in 0..self.count {
            processor(index, sink);
        }
    }
}

fn processor(index: u8, sink: &mut dyn AmlSink) {
    let mut apic = Vec::new();
    ProcessorLocalApic::new(index, index, EnabledStatus::Enabled).to_aml_bytes(&mut apic);
    let is_present = path_of("\\_SB_.HPLG.", name(b'P', index));
    let eject = Path::new("\\_SB_.HPLG.CEJE");
    let device = path_of("", name(b'C', index));
    let id = Name::new("_HID".into(), &"ACPI0007");
    let unique = Name::new("_UID".into(), &index);
    let there = Return::new(&STATUS_PRESENT);
    let if_present = If::new(&is_present, vec![&there]);
    let absent = Return::new(&aml::ZERO);
    let status = Method::new("_STA".into(), 0, false, vec![&if_present, &absent]);
    let entry = BufferData::new(apic);
    let entry = Name::new("_MAT".into(), &entry);
    let store = Store::new(&eject, &index);
    let let_go = Method::new("_EJ0".into(), 1, true, vec![&store]);
    let mut content: Vec<&dyn Aml> = vec![&id, &unique, &status, &entry];
    // The first vCPU cannot go: Linux runs on it what runs nowhere else.
    if index != 0 {
        content.push(&let_go);
    }
    Device::new(device, content).to_aml_bytes(sink);
}

fn vcpu_path(index: u8) -> Path {
    path_of("\\_SB_.", name(b'C', index))
}

fn path_of(prefix: &str, name: [u8; 4]) -> Path {
    let name = std::str::from_utf8(&name).expect("a letter and three digits");
    Path::new(&format!("{prefix}{name}"))
}

/// The name of something of vCPU `index`: a letter and three digits.
fn name(letter: u8, index: u8) -> [u8; 4] {
    let digit = |value: u8| b'0' + value % 10;
    [letter, digit(index / 100), digit(index / 10), digit(index)]
}
