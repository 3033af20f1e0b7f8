//! The command line.
use crate::dev::Opts;
use crate::load::{Job, Workload};
use crate::verify;
use clap::Parser;
use std::time::Duration;

/// vhost-user-blk front-end without a VM: load generator, verifier, chain fuzzer.
#[derive(Parser)]
pub(crate) struct Args {
    /// Socket of the server
    #[arg(long, value_name = "PATH")]
    socket: String,
    /// Start this server (run by sh; @S stands for the socket) and end it afterwards
    #[arg(long, value_name = "COMMAND")]
    pub(crate) server_cmd: Option<String>,
    /// Process whose CPU time is reported, for a server that runs already
    #[arg(long, value_name = "PID")]
    pub(crate) server_pid: Option<i32>,

    /// Only print what the device offers
    #[arg(long)]
    pub(crate) info: bool,
    /// Post unusual and malformed chains
    #[arg(long)]
    pub(crate) fuzz_chain: bool,
    /// Random I/O checked against a model
    #[arg(long)]
    verify: bool,
    /// Verify with N times kill -9, restart and reconnect
    #[arg(long, value_name = "N", default_value_t = 0, requires = "server_cmd")]
    reconnect_kill: u32,

    /// With --reconnect-kill: count the time to resume from when this image's lock is free
    #[arg(long, value_name = "FILE")]
    image: Option<String>,
    /// With --reconnect-kill: change what the server finds in flight, as one does that loses or repeats requests
    #[arg(long)]
    spoil_inflight: Option<verify::Spoil>,
    /// Verify: a request that takes longer is called lost
    #[arg(long, value_name = "SECONDS", default_value_t = 15)]
    stall: u64,

    /// Queues, one thread each
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    queues: u16,
    /// Entries of each ring
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u16).range(2..=32768))]
    vring: u16,
    /// Data descriptors of a request
    #[arg(long, value_name = "N", default_value_t = 1)]
    segs: usize,
    /// Leave VIRTIO_RING_F_EVENT_IDX out
    #[arg(long)]
    no_event_idx: bool,
    /// Leave VIRTIO_RING_F_INDIRECT_DESC out
    #[arg(long)]
    no_indirect: bool,
    /// ADD_MEM_REG instead of SET_MEM_TABLE
    #[arg(long)]
    mem_slots: bool,
    /// Leave INFLIGHT_SHMFD out of a verify run
    #[arg(long)]
    no_inflight: bool,
    /// Let the server keep an inflight region in a load run too
    #[arg(long)]
    inflight: bool,

    /// Requests in flight per queue (1; verify: 16)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    iodepth: Option<u32>,
    /// Seconds (3; verify: 5)
    #[arg(long, value_name = "SECONDS")]
    runtime: Option<f64>,
    /// Start of the range
    #[arg(long, value_name = "BYTES", default_value = "0", value_parser = size)]
    offset: u64,
    /// Length of the range; 0: to the end of the disk
    #[arg(long, value_name = "BYTES", default_value = "0", value_parser = size)]
    size: u64,
    /// Says everything about a run that is random
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Spin instead of sleeping on the eventfd
    #[arg(long)]
    poll: bool,

    /// Workload
    #[arg(long, default_value = "randread")]
    pub(crate) rw: Workload,
    /// Block size
    #[arg(long, value_name = "BYTES", default_value = "4k", value_parser = size)]
    bs: u64,
    /// Seconds before measuring begins
    #[arg(long, value_name = "SECONDS", default_value_t = 0.3)]
    ramp: f64,
    /// Percentage of reads in randrw
    #[arg(long, value_name = "PERCENT", default_value_t = 70)]
    rwmix: u64,
    /// In flush-mix every N-th request is a flush
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u64).range(1..))]
    flush_every: u64,
    /// write_zeroes may give the space back
    #[arg(long)]
    unmap: bool,
    /// Cover the range once instead of running for a time
    #[arg(long)]
    once: bool,
    /// Text for the "tag" of the result
    #[arg(long, default_value = "")]
    pub(crate) tag: String,

    /// Verify: bytes of a unit of the model
    #[arg(long, value_name = "BYTES", default_value = "4k", value_parser = size)]
    unit: u64,
    /// Verify: most units of a request
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..))]
    max_units: u32,
    /// Verify: weights of write,read,write_zeroes,discard,flush
    #[arg(long, default_value = "45,40,6,6,3", value_parser = weights)]
    mix: [u64; 5],
    /// Verify: the disk is all zero at first
    #[arg(long)]
    assume_zero: bool,
    /// Verify: keep the model in this file between runs
    #[arg(long, value_name = "FILE")]
    shadow: Option<String>,
    /// Verify: write what the range must contain at the end as a sparse raw file
    #[arg(long, value_name = "FILE")]
    dump_model: Option<String>,
    /// Verify: only read everything once
    #[arg(long)]
    check_only: bool,
    /// Verify: the server was killed since the shadow was written
    #[arg(long)]
    crashed: bool,
}

/// Numbers with k, m, g suffixes (1024).
fn size(s: &str) -> Result<u64, String> {
    let lower = s.to_ascii_lowercase();
    let (digits, shift) = match lower.as_bytes().last() {
        Some(b'k') => (&lower[..lower.len() - 1], 10),
        Some(b'm') => (&lower[..lower.len() - 1], 20),
        Some(b'g') => (&lower[..lower.len() - 1], 30),
        _ => (&lower[..], 0),
    };
    let n: u64 = digits.parse().map_err(|_| format!("not a size: {s}"))?;
    n.checked_mul(1 << shift).ok_or_else(|| format!("too large: {s}"))
}

fn weights(s: &str) -> Result<[u64; 5], String> {
    let v: Result<Vec<u64>, _> = s.split(',').map(str::parse).collect();
    let v = v.map_err(|e| e.to_string())?;
    if v.iter().sum::<u64>() == 0 {
        return Err("all weights are 0".into());
    }
    v.try_into().map_err(|_| "five weights are wanted".into())
}

impl Args {
    pub(crate) fn verifying(&self) -> bool {
        self.verify || self.check_only || self.reconnect_kill > 0
    }

    pub(crate) fn opts(&self) -> Opts {
        Opts {
            socket: self.socket.clone(),
            queues: self.queues.into(),
            vring: self.vring,
            segs: self.segs.max(1),
            no_event_idx: self.no_event_idx,
            no_indirect: self.no_indirect,
            mem_slots: self.mem_slots,
            inflight: if self.verifying() { !self.no_inflight } else { self.inflight },
        }
    }

    pub(crate) fn job(&self) -> Job {
        Job {
            rw: self.rw,
            bs: self.bs.max(512) as usize,
            depth: self.iodepth.unwrap_or(1) as usize,
            runtime: self.runtime.unwrap_or(3.0),
            ramp: self.ramp,
            offset: self.offset,
            size: self.size,
            seed: self.seed,
            poll: self.poll,
            once: self.once,
            read_pct: self.rwmix,
            flush_every: self.flush_every,
            unmap: self.unmap,
        }
    }

    pub(crate) fn verify_cfg(&self) -> verify::Cfg {
        verify::Cfg {
            unit: (self.unit as usize).next_multiple_of(512).max(512),
            max_units: self.max_units as usize,
            depth: self.iodepth.unwrap_or(16) as usize,
            runtime: self.runtime.unwrap_or(5.0),
            offset: self.offset,
            size: self.size,
            seed: self.seed,
            poll: self.poll,
            mix: self.mix,
            assume_zero: self.assume_zero,
            shadow: self.shadow.clone(),
            dump_model: self.dump_model.clone(),
            check_only: self.check_only,
            crashed: self.crashed,
            kills: self.reconnect_kill,
            image: self.image.clone(),
            spoil: self.spoil_inflight,
            stall: Duration::from_secs(self.stall),
        }
    }
}
