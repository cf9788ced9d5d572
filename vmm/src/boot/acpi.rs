//! The ACPI tables, in the hardware-reduced form (ACPI 6.5, 4.1): no SMI, no power management timer, no legacy interrupt
//! controller, so that the guest probes for none of them.

mod hotplug;
mod processors;
mod slots;

use acpi_tables::aml::{self, AddressSpace, AddressSpaceCacheable, EISAName, Path};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as GasSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use self::hotplug::EventDevice;
use self::processors::{ProcessorController, Processors};
use self::slots::{SlotController, Slots};
use crate::error::Error;
use crate::layout::{
    ACPI_BASE, ACPI_END, ECAM_BASE, ECAM_SIZE, IOAPIC_BASE, LAPIC_BASE, PCI_WINDOW_32, POWER_PORTS,
    PVPANIC_PORTS, SERIAL_GSI, SERIAL_PORTS, pci_window_64,
};
use crate::pci::SLOTS;
use crate::platform::power;

const OEM_ID: [u8; 6] = *b"HUSK  ";
const OEM_TABLE_ID: [u8; 8] = *b"HUSKVM  ";
const OEM_REVISION: u32 = 1;
/// Revision 2 and later have 64-bit integers.
const DSDT_REVISION: u8 = 6;
/// FADT, IA-PC boot architecture flags (5.2.9.3): no VGA, no CMOS clock.
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_RTC: u16 = 1 << 5;
/// Tables start at multiples of this.
const ALIGNMENT: u64 = 16;

/// What the tables describe.
#[derive(Debug, Clone, Copy)]
pub(super) struct Machine {
    /// vCPUs that are there from the start.
    pub(super) vcpus: u8,
    /// vCPUs that there may be.
    pub(super) max_vcpus: u8,
    /// The first address above all memory, including what may be plugged in.
    pub(super) memory_end: u64,
    /// The first PCI slot into which a device may come later.
    pub(super) first_late_slot: u8,
}

/// Writes all tables and returns the address of the RSDP.
pub(super) fn write(memory: &GuestMemoryMmap, machine: Machine) -> Result<GuestAddress, Error> {
    let tables = Tables::build(machine);
    if tables.end() > ACPI_END {
        return Err(Error::AcpiTooLarge {
            size: tables.end() - ACPI_BASE,
            room: ACPI_END - ACPI_BASE,
        });
    }
    memory
        .write_slice(&tables.bytes, GuestAddress(ACPI_BASE))
        .map_err(|source| Error::WriteBootData {
            what: "ACPI tables",
            source,
        })?;
    Ok(GuestAddress(ACPI_BASE))
}

/// All tables as they lie from [`ACPI_BASE`]: the RSDP first, then the others.
#[derive(Debug)]
struct Tables {
    bytes: Vec<u8>,
}

impl Tables {
    fn build(machine: Machine) -> Self {
        let mut tables = Self {
            bytes: vec![0; Rsdp::len()],
        };
        let dsdt = tables.add(&dsdt(machine));
        let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
        xsdt.add_entry(tables.add(&fadt(dsdt)));
        xsdt.add_entry(tables.add(&madt(machine)));
        xsdt.add_entry(tables.add(&mcfg()));
        let xsdt = tables.add(&xsdt);
        let mut rsdp = Vec::new();
        Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
        tables.bytes[..rsdp.len()].copy_from_slice(&rsdp);
        tables
    }

    /// Appends a table and returns its address.
    fn add(&mut self, table: &dyn Aml) -> u64 {
        let address = self.end().next_multiple_of(ALIGNMENT);
        while self.end() < address {
            self.bytes.push(0);
        }
        table.to_aml_bytes(&mut self.bytes);
        address
    }

    fn end(&self) -> u64 {
        ACPI_BASE + self.bytes.len() as u64
    }
}

/// A byte-wide register at an I/O port.
fn port(number: u64) -> GAS {
    GAS::new(GasSpace::SystemIo, 8, 0, AccessSize::ByteAccess, number)
}

fn fadt(dsdt: u64) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_RTC).into();
    fadt.sleep_control_reg = port(POWER_PORTS.start + power::SLEEP_CONTROL);
    fadt.sleep_status_reg = port(POWER_PORTS.start + power::SLEEP_STATUS);
    fadt.reset_reg = port(POWER_PORTS.start + power::RESET);
    fadt.reset_value = power::RESET_VALUE;
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"Husk\0\0\0\0").into();
    fadt.finalize()
}

fn madt(machine: Machine) -> impl Aml {
    let mut madt = MADT::new(
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
        LocalInterruptController::Address(LAPIC_BASE),
    );
    for vcpu in 0..machine.max_vcpus {
        let status = if vcpu < machine.vcpus {
            EnabledStatus::Enabled
        } else {
            EnabledStatus::DisabledOnlineCapable
        };
        madt.add_structure(ProcessorLocalApic::new(vcpu, vcpu, status));
    }
    madt.add_structure(IoApic::new(0, IOAPIC_BASE, 0));
    madt
}

fn mcfg() -> impl Aml {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(ECAM_BASE, 0, 0, 0);
    mcfg
}

/// The devices that cannot be found by asking a bus.
fn dsdt(machine: Machine) -> impl Aml {
    let mut sdt = Sdt::new(
        *b"DSDT",
        36,
        DSDT_REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    let mut content = Vec::new();
    let bridge = HostBridge {
        memory_end: machine.memory_end,
    };
    let mut events = EventDevice::default();
    let processor_controller = ProcessorController {
        max_vcpus: machine.max_vcpus,
    };
    let processors = Processors {
        count: machine.max_vcpus,
    };
    let late = machine.first_late_slot..SLOTS;
    let slot_controller = SlotController(late.clone());
    let slots = Slots(late.clone());
    let mut devices: Vec<&dyn Aml> = vec![&bridge, &EcamReservation, &SerialPort, &PanicNotifier];
    // What cannot change needs no way to hear of changes: the guest has less to look at while it boots.
    if machine.max_vcpus > machine.vcpus {
        devices.extend([&processor_controller as &dyn Aml, &processors]);
        events.scans.push(processors::SCAN);
    }
    if !late.is_empty() {
        devices.extend([&slot_controller as &dyn Aml, &slots]);
        events.scans.push(slots::SCAN);
    }
    devices.push(&events);
    aml::Scope::new("_SB_".into(), devices).to_aml_bytes(&mut content);
    // SLP_TYP for S5, power off; the others are for registers that a hardware-reduced machine does not have.
    aml::Name::new(
        Path::new("_S5_"),
        &aml::Package::new(vec![
            &power::SLEEP_TYPE_S5,
            &aml::ZERO,
            &aml::ZERO,
            &aml::ZERO,
        ]),
    )
    .to_aml_bytes(&mut content);
    sdt.append_slice(&content);
    Bytestream(sdt)
}

/// A finished table as AML.
struct Bytestream(Sdt);

impl Aml for Bytestream {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(self.0.as_slice());
    }
}

fn low_half(value: u64) -> u32 {
    u32::try_from(value).expect("the address map puts it below 4 GiB")
}

fn low_word(value: u64) -> u16 {
    u16::try_from(value).expect("an I/O port")
}

fn port_count(ports: &std::ops::Range<u64>) -> u8 {
    u8::try_from(ports.end - ports.start).expect("a handful of ports")
}

struct HostBridge {
    memory_end: u64,
}

impl Aml for HostBridge {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let high = pci_window_64(self.memory_end);
        aml::Device::new(
            "PCI0".into(),
            vec![
                &aml::Name::new("_HID".into(), &EISAName::new("PNP0A08")),
                &aml::Name::new("_CID".into(), &EISAName::new("PNP0A03")),
                &aml::Name::new("_UID".into(), &aml::ZERO),
                &aml::Name::new("_SEG".into(), &aml::ZERO),
                &aml::Name::new("_BBN".into(), &aml::ZERO),
                &aml::Name::new(
                    "_CRS".into(),
                    &aml::ResourceTemplate::new(vec![
                        &AddressSpace::new_bus_number(0u16, 0u16),
                        &AddressSpace::new_memory(
                            AddressSpaceCacheable::NotCacheable,
                            true,
                            low_half(PCI_WINDOW_32.start),
                            low_half(PCI_WINDOW_32.end - 1),
                            None,
                        ),
                        &AddressSpace::new_memory(
                            AddressSpaceCacheable::NotCacheable,
                            true,
                            high.start,
                            high.end - 1,
                            None,
                        ),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// Linux uses configuration space only if a device owns its addresses.
struct EcamReservation;

impl Aml for EcamReservation {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        aml::Device::new(
            "MBRD".into(),
            vec![
                &aml::Name::new("_HID".into(), &EISAName::new("PNP0C02")),
                &aml::Name::new("_UID".into(), &aml::ZERO),
                &aml::Name::new(
                    "_CRS".into(),
                    &aml::ResourceTemplate::new(vec![&aml::Memory32Fixed::new(
                        true,
                        low_half(ECAM_BASE),
                        low_half(ECAM_SIZE),
                    )]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

struct SerialPort;

impl Aml for SerialPort {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let base = low_word(SERIAL_PORTS.start);
        aml::Device::new(
            "COM1".into(),
            vec![
                &aml::Name::new("_HID".into(), &EISAName::new("PNP0501")),
                &aml::Name::new("_UID".into(), &aml::ZERO),
                &aml::Name::new(
                    "_CRS".into(),
                    &aml::ResourceTemplate::new(vec![
                        &aml::Interrupt::new(true, true, false, false, SERIAL_GSI),
                        &aml::IO::new(base, base, 0, port_count(&SERIAL_PORTS)),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

struct PanicNotifier;

impl Aml for PanicNotifier {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let base = low_word(PVPANIC_PORTS.start);
        aml::Device::new(
            "PEVT".into(),
            vec![
                &aml::Name::new("_HID".into(), &"QEMU0001"),
                &aml::Name::new(
                    "_CRS".into(),
                    &aml::ResourceTemplate::new(vec![&aml::IO::new(
                        base,
                        base,
                        0,
                        port_count(&PVPANIC_PORTS),
                    )]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MACHINE: Machine = Machine {
        vcpus: 1,
        max_vcpus: 1,
        memory_end: 256 << 20,
        first_late_slot: SLOTS,
    };

    /// Flags of a local APIC (5.2.12.2).
    const ENABLED: u8 = 1;
    const ONLINE_CAPABLE: u8 = 2;

    fn table_at(tables: &Tables, address: u64) -> &[u8] {
        let at = usize::try_from(address - ACPI_BASE).unwrap();
        let len = u32::from_le_bytes(tables.bytes[at + 4..at + 8].try_into().unwrap());
        &tables.bytes[at..at + usize::try_from(len).unwrap()]
    }

    fn qword(table: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(table[at..at + 8].try_into().unwrap())
    }

    fn sums_to_zero(table: &[u8]) -> bool {
        table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)) == 0
    }

    /// Follows the pointers as a guest does: RSDP, XSDT, then each table by its signature.
    fn find<'a>(tables: &'a Tables, signature: &[u8; 4]) -> &'a [u8] {
        let rsdp = &tables.bytes[..36];
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert!(sums_to_zero(&rsdp[..20]) && sums_to_zero(rsdp));
        let xsdt = table_at(tables, qword(rsdp, 24));
        assert!(sums_to_zero(xsdt));
        xsdt[36..]
            .chunks_exact(8)
            .map(|pointer| table_at(tables, qword(pointer, 0)))
            .find(|table| &table[..4] == signature)
            .unwrap()
    }

    #[test]
    fn every_table_is_reached_and_sums_to_zero() {
        let tables = Tables::build(MACHINE);
        for signature in [b"FACP", b"APIC", b"MCFG"] {
            assert!(sums_to_zero(find(&tables, signature)));
        }
    }

    #[test]
    fn the_fadt_is_hardware_reduced_and_names_dsdt_and_registers() {
        let tables = Tables::build(MACHINE);
        let fadt = find(&tables, b"FACP");
        assert_eq!(fadt[8], 6, "revision");
        let flags = u32::from_le_bytes(fadt[112..116].try_into().unwrap());
        assert_ne!(flags & Flags::HwReducedAcpi as u32, 0);
        assert_ne!(flags & Flags::ResetRegSup as u32, 0);
        assert_eq!(qword(fadt, 120), POWER_PORTS.start + power::RESET);
        assert_eq!(fadt[128], power::RESET_VALUE);
        let dsdt = table_at(&tables, qword(fadt, 140));
        assert_eq!(&dsdt[..4], b"DSDT");
        assert!(sums_to_zero(dsdt));
        assert_eq!(qword(fadt, 248), POWER_PORTS.start + power::SLEEP_CONTROL);
        assert_eq!(qword(fadt, 260), POWER_PORTS.start + power::SLEEP_STATUS);
    }

    #[test]
    fn the_madt_has_a_local_apic_for_each_vcpu_that_there_may_be() {
        let tables = Tables::build(Machine {
            vcpus: 2,
            max_vcpus: 3,
            ..MACHINE
        });
        let mut rest = &find(&tables, b"APIC")[44..];
        let mut apics = Vec::new();
        let mut ioapics = 0;
        while let [kind, len, ..] = *rest {
            match kind {
                0 => apics.push((rest[3], rest[4])),
                1 => ioapics += 1,
                other => panic!("structure of type {other}"),
            }
            rest = &rest[usize::from(len)..];
        }
        assert_eq!(
            (apics, ioapics),
            (vec![(0, ENABLED), (1, ENABLED), (2, ONLINE_CAPABLE)], 1)
        );
    }

    #[test]
    fn the_mcfg_names_one_bus() {
        let tables = Tables::build(MACHINE);
        let mcfg = find(&tables, b"MCFG");
        assert_eq!(qword(mcfg, 44), ECAM_BASE);
        assert_eq!(mcfg[54..56], [0, 0]);
    }

    #[test]
    fn the_most_vcpus_fit() {
        let tables = Tables::build(Machine {
            vcpus: 1,
            max_vcpus: u8::MAX,
            memory_end: 1 << 40,
            first_late_slot: 0,
        });
        assert!(tables.end() <= ACPI_END);
    }

    #[test]
    fn hot_plug_is_described_where_something_can_be_plugged() {
        let dsdt_of = |max_vcpus, first_late_slot| {
            let tables = Tables::build(Machine {
                max_vcpus,
                first_late_slot,
                ..MACHINE
            });
            let fadt = find(&tables, b"FACP");
            table_at(&tables, qword(fadt, 140)).to_vec()
        };
        let has = |dsdt: &[u8], what: &[u8]| dsdt.windows(what.len()).any(|seen| seen == what);
        let lacks_all = |dsdt: &[u8], what: &[&[u8]]| what.iter().all(|what| !has(dsdt, what));
        assert!(lacks_all(&dsdt_of(1, SLOTS), &[b"ACPI0013", b"_EJ0"]));
        let processors: [&[u8]; 8] = [
            b"ACPI0013",
            b"ACPI0007",
            b"C000",
            b"C002",
            b"P002",
            b"_EVT",
            b"_EJ0",
            b"_MAT",
        ];
        let dsdt = dsdt_of(3, SLOTS);
        for what in processors {
            assert!(has(&dsdt, what), "{what:?}");
        }
        assert!(lacks_all(&dsdt, &[b"C003", b"S031"]));
        let dsdt = dsdt_of(1, 7);
        for what in [
            &b"ACPI0013"[..],
            b"S007",
            b"S031",
            b"_EVT",
            b"_EJ0",
            b"_SUN",
        ] {
            assert!(has(&dsdt, what), "{what:?}");
        }
        assert!(lacks_all(&dsdt, &[b"ACPI0007", b"S006", b"S032"]));
    }
}
