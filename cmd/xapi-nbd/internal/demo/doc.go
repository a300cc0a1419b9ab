// Package demo shows the service in one process: a simulated XenServer host, the service,
// and a client that makes a full copy and an increment.
//
// It uses the service as main does, and nothing that is behind package service. It is the
// only package besides tests that may import the simulated host and certificates made here.
package demo
