//! End-to-end tests: they run the real `vmlab`, and nearly all of them boot VMs. One program for all of
//! them keeps every CPU busy to the end.

#![allow(clippy::unwrap_used, reason = "helpers of tests may fail anywhere")]

mod common;
mod facts;

mod action;
mod both;
mod cache;
mod disks;
mod environment;
mod exit_codes;
mod failures;
mod file_servers;
mod files;
mod filesystem;
mod image_build;
mod images;
mod kept_apart;
mod kernels;
mod machine;
mod modules;
mod native;
mod nested;
mod new_disks;
mod other_tests;
mod pages;
mod power_cuts;
mod repeat;
mod report;
mod rust_tests;
mod served_disks;
mod signals;
mod snapshots;
mod snapshots_apart;
mod snapshots_damage;
mod stalled;
mod streams;
mod targets;
mod targets_harmed;
mod terminal;
mod timings;
mod tools;
mod users;
mod virtiofs;
mod vmtest;
mod vsock;
