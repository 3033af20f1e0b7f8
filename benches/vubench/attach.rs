//! Queues in shared memory, made and started on a connection.
use crate::dev::{Dev, Info, Opts, err};
use crate::features::F_PROTOCOL;
use crate::mem::Mem;
use crate::queue::Queue;
use std::io;
use std::sync::Arc;
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VringConfigData};

/// Queues carved out of one new piece of shared memory.
pub(crate) fn make_queues(o: &Opts, info: &Info, depth: usize, bs: usize) -> io::Result<Vec<Queue>> {
    if o.queues as u64 > info.max_queues {
        let max = info.max_queues;
        return Err(io::Error::other(format!("device has {max} queues")));
    }
    let mut mem = Mem::new(o.queues * Queue::bytes(o, depth, bs))?;
    let layouts: Vec<_> = (0..o.queues).map(|_| Queue::layout(&mut mem, o, depth, bs)).collect();
    let mem = Arc::new(mem);
    layouts.into_iter().map(|l| Queue::new(mem.clone(), l, o, info, depth)).collect()
}

/// Starts a queue as the device's `i`-th vring, at the index `base`.
pub(crate) fn start(dev: &mut Dev, i: usize, q: &Queue, base: u16) -> io::Result<()> {
    let (fe, r, mem) = (&mut dev.fe, &q.ring, &q.mem);
    fe.set_vring_num(i, r.size).map_err(err("set_vring_num"))?;
    fe.set_vring_base(i, base).map_err(err("set_vring_base"))?;
    let c = VringConfigData {
        queue_max_size: r.size,
        queue_size: r.size,
        flags: 0,
        desc_table_addr: mem.uaddr(r.desc),
        used_ring_addr: mem.uaddr(r.used),
        avail_ring_addr: mem.uaddr(r.avail),
        log_addr: None,
    };
    fe.set_vring_addr(i, &c).map_err(err("set_vring_addr"))?;
    fe.set_vring_call(i, &q.call).map_err(err("set_vring_call"))?;
    fe.set_vring_kick(i, &q.kick).map_err(err("set_vring_kick"))?;
    if dev.info.has(F_PROTOCOL) {
        fe.set_vring_enable(i, true).map_err(err("set_vring_enable"))?;
    }
    Ok(())
}

/// Connects and starts all queues.
pub(crate) fn open(o: &Opts, depth: usize, bs: usize) -> io::Result<(Dev, Vec<Queue>)> {
    let mut dev = Dev::connect(o)?;
    let mut qs = make_queues(o, &dev.info, depth, bs)?;
    if let Some((d, f)) = dev.get_inflight(o)? {
        dev.set_inflight(&d, &f)?;
    }
    dev.set_mem(&qs[0].mem, o.mem_slots)?;
    for (i, q) in qs.iter_mut().enumerate() {
        q.ring.disable_irq();
        start(&mut dev, i, q, 0)?;
    }
    Ok((dev, qs))
}
