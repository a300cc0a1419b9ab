// Package nbdtest helps to test servers, clients and devices of package nbd:
//
//   - [Mem] is a device that watches how it is used, [RAM] one that can be
//     written too, [Faulty] and [FaultyRAM] spoil them, and [Exporter] hands
//     them out;
//   - [TestDevice] is the conformance suite that every device passes;
//   - [Serve] and [Pipe] run a server for one test, [TLS] makes certificates;
//   - [Play] and [PlayServer] drive a server or a client from a transcript.
//
// Nothing here waits for time to pass, except that a transcript gives up when
// its peer is silent.
package nbdtest
