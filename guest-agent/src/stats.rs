//! Counters of a container, read from the files of its cgroup (v2), and of the guest's network interfaces, which are
//! the pod's. A controller that is off has no files; its counters are then zero.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use husk_protocol::agent;

use crate::cgroup::{Cgroup, flat_keyed};

/// What the interface files say for "no limit".
const NO_LIMIT: u64 = u64::MAX;

/// Everything that the proto's StatsContainer promises.
pub(crate) fn of(cgroup: &Cgroup) -> agent::StatsContainerResponse {
    let folder = cgroup.path();
    let net_dev = fs::read_to_string("/proc/net/dev").unwrap_or_default();
    agent::StatsContainerResponse {
        cpu: Some(cpu(folder)).into(),
        memory: Some(memory(folder)).into(),
        pids: Some(agent::PidsStats {
            current: number(folder, "pids.current"),
            limit: limit(folder, "pids.max"),
            ..Default::default()
        })
        .into(),
        io: io(&text(folder, "io.stat")),
        network: network(&net_dev),
        cpu_pressure: pressure(&text(folder, "cpu.pressure")).into(),
        memory_pressure: pressure(&text(folder, "memory.pressure")).into(),
        io_pressure: pressure(&text(folder, "io.pressure")).into(),
        ..Default::default()
    }
}

fn cpu(folder: &Path) -> agent::CpuStats {
    let stat = table(folder, "cpu.stat");
    let value = |key| stat.get(key).copied().unwrap_or(0);
    agent::CpuStats {
        usage_usec: value("usage_usec"),
        user_usec: value("user_usec"),
        system_usec: value("system_usec"),
        nr_periods: value("nr_periods"),
        nr_throttled: value("nr_throttled"),
        throttled_usec: value("throttled_usec"),
        ..Default::default()
    }
}

fn memory(folder: &Path) -> agent::MemoryStats {
    agent::MemoryStats {
        usage: number(folder, "memory.current"),
        usage_limit: limit(folder, "memory.max"),
        swap_usage: number(folder, "memory.swap.current"),
        swap_limit: limit(folder, "memory.swap.max"),
        max_usage: number(folder, "memory.peak"),
        stat: table(folder, "memory.stat"),
        events: table(folder, "memory.events"),
        ..Default::default()
    }
}

/// `io.stat`: `8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6`, one device a line.
fn io(text: &str) -> Vec<agent::IoStats> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            let (major, minor) = words.next()?.split_once(':')?;
            let mut stats = agent::IoStats {
                major: major.parse().ok()?,
                minor: minor.parse().ok()?,
                ..Default::default()
            };
            for (key, value) in words.filter_map(|word| word.split_once('=')) {
                let counter = match key {
                    "rbytes" => &mut stats.rbytes,
                    "wbytes" => &mut stats.wbytes,
                    "rios" => &mut stats.rios,
                    "wios" => &mut stats.wios,
                    _ => continue,
                };
                *counter = value.parse().unwrap_or(0);
            }
            Some(stats)
        })
        .collect()
}

/// `/proc/net/dev`: two lines of headings, then `name: ` and 16 columns, receive before transmit.
fn network(text: &str) -> Vec<agent::NetworkStats> {
    text.lines()
        .skip(2)
        .filter_map(|line| {
            let (name, columns) = line.split_once(':')?;
            let name = name.trim();
            let columns: Vec<u64> = columns
                .split_ascii_whitespace()
                .map_while(|column| column.parse().ok())
                .collect();
            let [rx_bytes, rx_packets, rx_errors, rx_dropped, ..] = columns[..] else {
                return None;
            };
            let [tx_bytes, tx_packets, tx_errors, tx_dropped, ..] = *columns.get(8..)? else {
                return None;
            };
            (name != "lo").then(|| agent::NetworkStats {
                name: name.to_owned(),
                rx_bytes,
                rx_packets,
                rx_errors,
                rx_dropped,
                tx_bytes,
                tx_packets,
                tx_errors,
                tx_dropped,
                ..Default::default()
            })
        })
        .collect()
}

/// A pressure file: `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`, and the same of `full`.
fn pressure(text: &str) -> Option<agent::PressureStats> {
    let line = |name| {
        let words = text.lines().find_map(|line| line.strip_prefix(name))?;
        let mut found = agent::Pressure::default();
        for (key, value) in words
            .split_ascii_whitespace()
            .filter_map(|word| word.split_once('='))
        {
            match key {
                "avg10" => found.avg10 = value.parse().ok()?,
                "avg60" => found.avg60 = value.parse().ok()?,
                "avg300" => found.avg300 = value.parse().ok()?,
                "total" => found.total = value.parse().ok()?,
                _ => {}
            }
        }
        Some(found)
    };
    Some(agent::PressureStats {
        some: Some(line("some ")?).into(),
        full: line("full ").into(),
        ..Default::default()
    })
}

fn text(folder: &Path, file: &str) -> String {
    fs::read_to_string(folder.join(file)).unwrap_or_default()
}

fn number(folder: &Path, file: &str) -> u64 {
    text(folder, file).trim().parse().unwrap_or(0)
}

fn limit(folder: &Path, file: &str) -> u64 {
    match text(folder, file).trim() {
        "max" => NO_LIMIT,
        number => number.parse().unwrap_or(0),
    }
}

fn table(folder: &Path, file: &str) -> HashMap<String, u64> {
    flat_keyed(&text(folder, file))
        .map(|(key, value)| (key.to_owned(), value))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_a_group_become_counters() {
        let folder = tempfile::tempdir().expect("a folder");
        for (file, text) in [
            ("cpu.stat", "usage_usec 30\nuser_usec 20\nsystem_usec 10\n"),
            ("memory.current", "4096\n"),
            ("memory.max", "max\n"),
            ("memory.stat", "anon 1\nfile 2\n"),
            ("memory.events", "oom_kill 1\n"),
            ("pids.current", "3\n"),
            ("pids.max", "100\n"),
            (
                "io.stat",
                "254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n",
            ),
            (
                "memory.pressure",
                "some avg10=1.50 avg60=0.20 avg300=0.00 total=77\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=5\n",
            ),
        ] {
            fs::write(folder.path().join(file), text).expect("a file");
        }
        let stats = of(&Cgroup::at(folder.path()));
        assert_eq!(stats.cpu.usage_usec, 30);
        assert_eq!(
            (stats.memory.usage, stats.memory.usage_limit),
            (4096, NO_LIMIT)
        );
        assert_eq!(stats.memory.stat["file"], 2);
        assert_eq!(stats.memory.events["oom_kill"], 1);
        assert_eq!((stats.pids.current, stats.pids.limit), (3, 100));
        assert_eq!((stats.io[0].major, stats.io[0].wios), (254, 4));
        let pressure = stats.memory_pressure;
        assert_eq!((pressure.some.total, pressure.full.total), (77, 5));
        assert!((pressure.some.avg10 - 1.5).abs() < 1e-9);
        assert!(stats.cpu_pressure.is_none());
    }

    #[test]
    fn interfaces_but_loopback_are_counted() {
        let text = "Inter-|   Receive\n face |bytes\n    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n  eth0: 10 2 3 4 0 0 0 0 50 6 7 8 0 0 0 0\n";
        let stats = network(text);
        assert_eq!(stats.len(), 1);
        assert_eq!(
            (
                stats[0].name.as_str(),
                stats[0].rx_bytes,
                stats[0].tx_dropped
            ),
            ("eth0", 10, 8)
        );
    }
}
