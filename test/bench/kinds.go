package main

import (
	"fmt"
)

// The names that tables and samples have for servers.
const (
	ours   = "ours"
	nbdkit = "nbdkit"
	qemu   = "qemu-nbd"
	splice = "splice" // a bare loop, see floor.go
	iperf  = "iperf3"
	direct = "direct" // reading the slow device without a server, see slow.go
)

// host is where everything listens and connects to.
const host = "127.0.0.1"

// kind is a program that serves.
type kind struct {
	name    string
	program string                            // to be looked up; "" means this or the built one
	argv    func(b *bench, l launch) []string // nil: no process, the case does it all
	ready   func(s *server) error             // whether it answers; errUnfit is no reason to try again
}

// launch is what a server is started with.
type launch struct {
	env         env
	image, port string
	cgroup      string // folder of the memory cgroup to be in, if any
}

// kinds are the servers that an environment is measured with. They run with
// their default settings; what is set is what must be.
func kinds(e env) []kind {
	switch {
	case e.floor:
		return []kind{
			{name: splice, argv: spliceArgs, ready: (*server).connects},
			{name: iperf, program: "iperf3", argv: iperfArgs, ready: (*server).iperfListens},
		}
	case e.device == stalledDevice:
		return []kind{{name: ours, argv: stalledArgs, ready: (*server).answers}}
	case e.device != plainDevice:
		all := []kind{
			{name: ours, argv: slowArgs, ready: (*server).answers},
			{name: nbdkit, program: "nbdkit", argv: nbdkitArgs, ready: (*server).answers},
		}
		if e.device == slowDevice {
			all = append(all, kind{name: direct})
		}
		return all
	}
	return []kind{
		{name: ours, argv: oursArgs, ready: (*server).answers},
		{name: nbdkit, program: "nbdkit", argv: nbdkitArgs, ready: (*server).answers},
		{name: qemu, program: "qemu-nbd", argv: qemuArgs, ready: (*server).answers},
	}
}

func oursArgs(b *bench, l launch) []string {
	argv := []string{b.tool, "serve", "--listen=" + host + ":" + l.port}
	if l.env.tls {
		argv = append(argv, "--certfile="+b.certs.pair)
	}
	return append(argv, l.image)
}

func slowArgs(b *bench, l launch) []string {
	return []string{b.self, "serve-slow", "-listen", host + ":" + l.port, "-delay", delayOf(l.env).String(), l.image}
}

func nbdkitArgs(b *bench, l launch) []string {
	argv := []string{b.programs["nbdkit"], "-r", "-f", "-i", host, "-p", l.port}
	if l.env.tls {
		argv = append(argv, "--tls=require", "--tls-certificates="+b.certs.server)
	}
	if l.env.device == plainDevice {
		return append(argv, "file", l.image)
	}
	return append(argv, "--filter=delay", "file", l.image, fmt.Sprintf("rdelay=%dms", delayOf(l.env).Milliseconds()))
}

func qemuArgs(b *bench, l launch) []string {
	clients := "16"
	if l.env.idle || l.env.crowd {
		clients = fmt.Sprint(idleConns + 16) // it accepts no more than that
	}
	argv := []string{b.programs["qemu-nbd"], "-r", "-e", clients, "-t", "-f", "raw", "-b", host, "-p", l.port}
	if l.env.tls {
		argv = append(argv, "--object", "tls-creds-x509,id=tls0,endpoint=server,verify-peer=no,dir="+b.certs.server, "--tls-creds=tls0")
	}
	return append(argv, l.image)
}

func spliceArgs(b *bench, l launch) []string {
	return []string{b.self, "serve-splice", "-listen", host + ":" + l.port, l.image}
}

func iperfArgs(b *bench, l launch) []string {
	return []string{b.programs["iperf3"], "-s", "-B", host, "-p", l.port, "--forceflush"}
}
