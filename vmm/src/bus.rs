//! The address spaces of the guest that lead to devices: I/O ports and memory-mapped I/O.

use std::ops::Range;
use std::sync::Arc;

use crate::error::Error;

/// A device as the guest's loads and stores see it.
///
/// Several vCPUs may call at once. `offset` is relative to the device's range, and the access lies inside it; nothing else
/// is promised about width or alignment.
pub(crate) trait BusDevice: Send + Sync {
    /// A load.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// A store.
    fn write(&self, offset: u64, data: &[u8]);
}

/// One address space.
#[derive(Default)]
pub(crate) struct Bus {
    /// Sorted by base, without overlap.
    devices: Vec<(Range<u64>, Arc<dyn BusDevice>)>,
}

impl Bus {
    /// Attaches a device to a range of addresses.
    pub(crate) fn attach(
        &mut self,
        range: Range<u64>,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), Error> {
        let at = self
            .devices
            .partition_point(|(other, _)| other.start < range.start);
        let after_previous = at == 0 || self.devices[at - 1].0.end <= range.start;
        let before_next = at == self.devices.len() || range.end <= self.devices[at].0.start;
        if range.is_empty() || !after_previous || !before_next {
            return Err(Error::AddressConflict {
                base: range.start,
                end: range.end,
            });
        }
        self.devices.insert(at, (range, device));
        Ok(())
    }

    /// A load of the guest. Where no device answers, or only to a part of the access, it reads as all ones.
    pub(crate) fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((offset, device)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// A store of the guest. Where no device answers it is lost.
    pub(crate) fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address, data.len()) {
            device.write(offset, data);
        }
    }

    fn find(&self, address: u64, len: usize) -> Option<(u64, &dyn BusDevice)> {
        let at = self
            .devices
            .partition_point(|(range, _)| range.start <= address);
        let (range, device) = self.devices.get(at.checked_sub(1)?)?;
        let end = address.checked_add(u64::try_from(len).ok()?)?;
        (end <= range.end).then(|| (address - range.start, device.as_ref()))
    }
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list()
            .entries(self.devices.iter().map(|(range, _)| range))
            .finish()
    }
}

/// Both address spaces.
#[derive(Debug, Default)]
pub(crate) struct Buses {
    /// I/O ports.
    pub(crate) ports: Bus,
    /// Memory-mapped I/O.
    pub(crate) mmio: Bus,
}

#[cfg(test)]
pub(crate) mod testing {
    use std::sync::Mutex;

    use super::*;

    /// A device that remembers what was written and answers reads with its offset.
    #[derive(Debug, Default)]
    pub(crate) struct Recorder {
        pub(crate) writes: Mutex<Vec<(u64, Vec<u8>)>>,
    }

    impl BusDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap());
        }

        fn write(&self, offset: u64, data: &[u8]) {
            self.writes.lock().unwrap().push((offset, data.to_vec()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::Recorder;
    use super::*;

    #[test]
    fn access_reaches_the_device_with_its_offset() {
        let mut bus = Bus::default();
        let device = Arc::new(Recorder::default());
        bus.attach(0x100..0x110, device.clone()).unwrap();
        let mut data = [0; 2];
        bus.read(0x104, &mut data);
        assert_eq!(data, [4, 4]);
        bus.write(0x10e, &[1, 2]);
        assert_eq!(*device.writes.lock().unwrap(), [(0xe, vec![1, 2])]);
    }

    #[test]
    fn access_beside_or_across_the_end_reads_ones() {
        let mut bus = Bus::default();
        let device = Arc::new(Recorder::default());
        bus.attach(0x100..0x110, device.clone()).unwrap();
        for address in [0, 0xff, 0x10f, 0x110, u64::MAX] {
            let mut data = [0; 2];
            bus.read(address, &mut data);
            assert_eq!(data, [0xff, 0xff], "at {address:#x}");
            bus.write(address, &data);
        }
        assert!(device.writes.lock().unwrap().is_empty());
    }

    #[test]
    fn overlapping_ranges_are_refused() {
        let mut bus = Bus::default();
        let device: Arc<dyn BusDevice> = Arc::new(Recorder::default());
        bus.attach(0x100..0x110, device.clone()).unwrap();
        bus.attach(0x110..0x120, device.clone()).unwrap();
        for range in [0xff..0x101, 0x10f..0x111, 0x118..0x130, 0x100..0x120, 5..5] {
            assert!(bus.attach(range, device.clone()).is_err());
        }
    }
}
