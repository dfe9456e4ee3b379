//! What is asked of the guests, by the ids of its rows.

use anyhow::Result;
use rig::Service;

use super::client::{Client, Speed};
use super::policy::{self, Policy};
use super::{memcached, postgres, redis, web};

/// Of loads that run for a time; wrk and pgbench know whole seconds.
const WARM_UP_MS: u64 = 1_000;

/// One load on one service.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    /// The ids of its rows begin so.
    pub id: &'static str,
    /// Over its table.
    pub about: &'static str,
    load: Load,
}

#[derive(Clone, Copy, Debug)]
enum Load {
    Redis(redis::Load),
    Memcached(memcached::Load),
    Web(web::Load),
    Postgres(postgres::Load),
}

/// A service and what is asked of it.
#[derive(Clone, Copy, Debug)]
pub struct Suite {
    /// What the guest runs.
    pub service: Service,
    /// Its loads.
    pub workloads: &'static [Workload],
    /// What protects it.
    pub policies: &'static [Policy],
}

const fn redis(id: &'static str, about: &'static str, clients: u64, batch: u64, keys: Option<u64>) -> Workload {
    Workload { id, about, load: Load::Redis(redis::Load { clients, batch, keys }) }
}

/// SETs of one client each that wait for their answers; INCR is compared with it.
pub const REDIS_PLAIN_16: &str = "redis-plain.c16.k100";
/// The same with more and more clients.
pub const BY_CLIENTS: [&str; 3] = ["redis-plain.c1.k100", REDIS_PLAIN_16, "redis-plain.c64.k100"];
/// INCR on one key.
pub const REDIS_INCR: &str = "redis-incr.c16";
/// What the switches are compared by.
pub const FIGURE_7: &str = "switches.c64.k100";
/// What COLO was measured with.
pub const REDIS_COLO: &str = "redis-p16.c64.k100";

const REDIS: [Workload; 9] = [
    redis("redis.c64.k100", "SET, 64 connections × 64 in flight, 100 keys", 64, 64, Some(100)),
    redis("redis.c64.k100000", "SET, 64 connections × 64 in flight, 100 000 keys", 64, 64, Some(100_000)),
    redis("redis-batch.c64.k100", "SET, 64 connections, batches of 1000, 100 keys", 64, 1_000, Some(100)),
    redis("redis-batch.c64.k100000", "SET, 64 connections, batches of 1000, 100 000 keys", 64, 1_000, Some(100_000)),
    redis(REDIS_COLO, "SET, 64 connections × 16 in flight, 100 keys", 64, 16, Some(100)),
    redis(BY_CLIENTS[0], "SET, 1 connection that waits for each answer", 1, 1, Some(100)),
    redis(REDIS_PLAIN_16, "SET, 16 connections that wait for each answer", 16, 1, Some(100)),
    redis(BY_CLIENTS[2], "SET, 64 connections that wait for each answer", 64, 1, Some(100)),
    redis(REDIS_INCR, "INCR of one key, 16 connections that wait for each answer", 16, 1, None),
];

const fn memcached(id: &'static str, about: &'static str, connections: usize, in_flight: usize) -> Workload {
    Workload { id, about, load: Load::Memcached(memcached::Load { connections, in_flight, keys: 10_000 }) }
}

const MEMCACHED: [Workload; 2] = [
    memcached("memcached.c64.k10000", "9 GETs to 1 SET, 64 connections × 16 in flight, 10 000 keys", 64, 16),
    memcached("memcached-plain.c16.k10000", "the same, 16 connections that wait for each answer", 16, 1),
];

const NGINX: [Workload; 1] = [Workload {
    id: "nginx.c64",
    about: "GET of a small page, 64 connections that wait for each answer",
    load: Load::Web(web::Load { connections: 64, path: "/", contains: "A protected guest" }),
}];

const LIGHTTPD: [Workload; 1] = [Workload {
    id: "lighttpd.c16",
    about: "GET of a page that PHP makes, 16 connections that wait for each answer",
    load: Load::Web(web::Load { connections: 16, path: "/", contains: "</table>" }),
}];

const POSTGRES: [Workload; 2] = [
    Workload {
        id: "postgres.c4",
        about: "pgbench's TPC-B-like transactions, 4 sessions",
        load: Load::Postgres(postgres::Load { sessions: 4, script: "tpcb-like" }),
    },
    Workload {
        id: "postgres-select.c16",
        about: "pgbench's SELECTs, 16 sessions",
        load: Load::Postgres(postgres::Load { sessions: 16, script: "select-only" }),
    },
];

const SWITCHES: [Workload; 1] =
    [redis(FIGURE_7, "SET, 64 connections × 64 in flight, 100 keys, switch by switch", 64, 64, Some(100))];

const fn suite(service: Service, workloads: &'static [Workload]) -> Suite {
    Suite { service, workloads, policies: &policy::ALL }
}

/// All of them.
pub const ALL: [Suite; 6] = [
    suite(Service::Redis, &REDIS),
    Suite { service: Service::Redis, workloads: &SWITCHES, policies: &policy::LADDER },
    suite(Service::Memcached, &MEMCACHED),
    suite(Service::Nginx, &NGINX),
    suite(Service::Lighttpd, &LIGHTTPD),
    suite(Service::Postgres, &POSTGRES),
];
/// What a smoke run does.
pub const SMOKE: [Suite; 1] = [Suite {
    service: Service::Redis,
    workloads: &[redis("redis.c4.k100", "SET, 4 connections × 4 in flight, 100 keys", 4, 4, Some(100))],
    policies: &policy::SMOKE,
}];

impl Workload {
    /// How many connections or sessions there are.
    #[must_use]
    pub fn clients(&self) -> u64 {
        match self.load {
            Load::Redis(load) => load.clients,
            Load::Memcached(load) => load.connections as u64,
            Load::Web(load) => load.connections,
            Load::Postgres(load) => load.sessions,
        }
    }

    /// Brings the service into the state that the load expects.
    ///
    /// # Errors
    /// The service does not answer as it should.
    pub fn prepare(&self, client: &Client<'_>) -> Result<()> {
        match self.load {
            Load::Redis(load) => load.prepare(client),
            Load::Memcached(load) => load.prepare(client),
            Load::Web(load) => load.prepare(client),
            Load::Postgres(load) => load.prepare(client),
        }
    }

    /// A first run that does not count. Returns how much [`Workload::run`] must do to take about `seconds`: requests for
    /// redis-benchmark, milliseconds for the others.
    ///
    /// # Errors
    /// The load generator fails.
    pub fn warm_up(&self, client: &Client<'_>, seconds: f64) -> Result<u64> {
        if let Load::Redis(load) = self.load {
            return load.requests_for(client, seconds);
        }
        // A session of PostgreSQL is slow to begin, and its transactions are long.
        let factor = if matches!(self.load, Load::Postgres(_)) { 3 } else { 1 };
        self.run(client, factor * WARM_UP_MS)?;
        Ok((seconds * 1e3) as u64 * factor.min(2))
    }

    /// The run that counts.
    ///
    /// # Errors
    /// The load generator fails, or an answer was wrong.
    pub fn run(&self, client: &Client<'_>, amount: u64) -> Result<Speed> {
        match self.load {
            Load::Redis(load) => load.run(client, amount),
            Load::Memcached(load) => load.run(client, amount),
            Load::Web(load) => load.run(client, amount),
            Load::Postgres(load) => load.run(client, amount),
        }
    }
}
