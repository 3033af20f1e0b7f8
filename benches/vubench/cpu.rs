//! CPU time of this process, of the server, and of everybody else on the machine.
use crate::sys::process_cpu;
use std::fs;

/// /proc counts in ticks of 10 ms on every Linux we run on.
const HZ: f64 = 100.0;

#[derive(Clone, Copy, Default)]
pub(crate) struct Cpu {
    pub(crate) client: f64,
    /// whole server process, ended threads included (process CPU clock)
    pub(crate) server: f64,
    pub(crate) server_user: f64,
    pub(crate) server_sys: f64,
    /// all CPUs, everything but idle and iowait
    machine: f64,
}

impl Cpu {
    pub(crate) fn now(pid: Option<i32>) -> Cpu {
        let (server_user, server_sys) = pid.map_or((0.0, 0.0), ticks);
        Cpu {
            client: process_cpu(None),
            server: pid.map_or(0.0, |p| process_cpu(Some(p))),
            server_user,
            server_sys,
            machine: machine(),
        }
    }

    pub(crate) fn since(self, o: Cpu) -> Cpu {
        Cpu {
            client: self.client - o.client,
            server: self.server - o.server,
            server_user: self.server_user - o.server_user,
            server_sys: self.server_sys - o.server_sys,
            machine: self.machine - o.machine,
        }
    }

    /// What everybody else burnt: the noise mark of a figure.
    pub(crate) fn others(&self) -> f64 {
        (self.machine - self.client - self.server).max(0.0)
    }
}

fn ticks(pid: i32) -> (f64, f64) {
    let s = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let f: Vec<&str> = s.rsplit(") ").next().unwrap_or("").split(' ').collect();
    let get = |i: usize| f.get(i).and_then(|v| v.parse().ok()).unwrap_or(0.0) / HZ;
    (get(11), get(12))
}

fn machine() -> f64 {
    let s = fs::read_to_string("/proc/stat").unwrap_or_default();
    let fields = s.lines().next().unwrap_or("").split_whitespace().skip(1);
    fields
        .take(8)
        .enumerate()
        .filter(|(i, _)| *i != 3 && *i != 4)
        .filter_map(|(_, v)| v.parse::<f64>().ok())
        .sum::<f64>()
        / HZ
}

/// Resident memory of a process in KiB, without what it shares: guest memory is the guest's.
pub(crate) fn own_memory_kb(pid: i32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let of = |name: &str| {
        let line = status.lines().find(|l| l.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok()
    };
    Some(of("RssAnon:")? + of("RssFile:")?)
}
