// Package nbdtest helps to test servers, clients and devices of package nbd:
//
//   - [Mem] is a read-only device that records calls against the contract of a device,
//     [RAM] one that can be written to, [Faulty] and [FaultyRAM] inject errors into them,
//     and [Exporter] opens them;
//   - [TestDevice] is the conformance suite for devices;
//   - [Serve] and [Pipe] run a server for one test, [TLS] makes certificates;
//   - [Play] and [PlayServer] drive a server or a client from a transcript.
//
// Nothing here waits for time to pass, except that a transcript gives up when
// its peer is silent.
package nbdtest
