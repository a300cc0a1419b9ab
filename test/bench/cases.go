package main

import (
	"context"
	"fmt"
	"regexp"
	"time"
)

// testCase is one client with its settings. It runs against every server of its
// environment in turn.
type testCase struct {
	name   string
	env    env
	client string // program that must be installed; "" is none
	only   string // the one server of the environment that is measured; "" is all
	cold   bool   // the loop device leaves the page cache before each run
	run    func(ctx context.Context, b *bench, s *server) (sample, error)
}

// env is the configuration that servers are started with. Cases with the same one share
// the servers.
type env struct {
	image  imageKind
	tls    bool
	device deviceKind
	idle   bool // new servers, whose memory is measured
}

// deviceKind is the device between the server and the image.
type deviceKind string

const (
	plainDevice   deviceKind = ""
	slowDevice    deviceKind = "slow"    // waits slowDelay before every read
	stalledDevice deviceKind = "stalled" // plain, and beside it an export whose reads never end
	copiedDevice  deviceKind = "copied"  // plain, for the comparison of two clients
)

const (
	kib = int64(1) << 10
	mib = int64(1) << 20
)

// shortSize returns a size as case names have it.
func shortSize(n int64) string {
	if n >= mib {
		return fmt.Sprintf("%dm", n/mib)
	}
	return fmt.Sprintf("%dk", n/kib)
}

// copyShape is how nbdcopy reads or writes a disk: connections, requests in flight on each, and the
// size of a request.
type copyShape struct {
	conns, requests int
	size            int64
}

// String returns the shape as case names have it.
func (s copyShape) String() string {
	return fmt.Sprintf("%dx%d/%s", s.conns, s.requests, shortSize(s.size))
}

var copyShapes = []copyShape{{1, 16, 256 * kib}, {1, 16, 2 * mib}, {4, 64, 256 * kib}, {4, 64, 2 * mib}}

// allCases returns the cases in the order in which they run.
func allCases() []testCase {
	var cases []testCase
	copies := func(prefix string, e env, shapes ...copyShape) {
		for _, shape := range shapes {
			cases = append(cases, testCase{
				name: fmt.Sprintf("%s/%s", prefix, shape),
				env:  e, client: "nbdcopy",
				run: func(ctx context.Context, b *bench, s *server) (sample, error) {
					return b.copyAway(ctx, s, s.addr, shape)
				},
			})
		}
	}
	random := func(prefix string, e env, size int64, depths ...int) {
		for _, depth := range depths {
			cases = append(cases, testCase{
				name: fmt.Sprintf("%s/%s/d%d", prefix, shortSize(size), depth), env: e, client: "fio",
				run: func(ctx context.Context, b *bench, s *server) (sample, error) { return b.fio(ctx, s, size, depth) },
			})
		}
	}
	for _, image := range []imageKind{fileImage, loopImage} {
		copies("bulk/"+string(image)+"/clear", env{image: image}, copyShapes...)
		copies("bulk/"+string(image)+"/tls", env{image: image, tls: true}, copyShapes...)
		random("random/"+string(image), env{image: image}, 4*kib, 1, 16, 64)
		random("random/"+string(image), env{image: image}, 64*kib, 1, 16, 64)
	}
	before := len(cases)
	// Xen Orchestra has 10 reads of 2 MiB in flight on each connection.
	copies("service/tls", env{image: loopImage, tls: true}, copyShape{1, 10, 2 * mib}, copyShape{4, 10, 2 * mib})
	copies("cold/clear", env{image: loopImage}, copyShapes[1])
	random("cold/clear", env{image: loopImage}, 4*kib, 1, 64)
	for i := range cases[before:] {
		cases[before+i].cold = true
	}
	copies("zeros/tls", env{image: zerosImage, tls: true}, copyShapes...)
	random("slow", env{image: fileImage, device: slowDevice}, 4*kib, slowDepth)
	random("slow", env{image: fileImage, device: slowDevice}, 2*mib, slowDepth)
	cases = append(cases, linkCases()...)
	cases = append(cases, copyCases()...)
	cases = append(cases, mirrorCases()...)
	cases = append(cases, crowdCases()...)
	cases = append(cases, serviceCases()...)
	cases = append(cases, writeCases()...)
	return append(cases,
		testCase{name: "memory/idle", env: env{image: fileImage, idle: true}, run: func(ctx context.Context, b *bench, s *server) (sample, error) {
			return idle(ctx, s)
		}},
		testCase{name: "cache", env: env{image: diskImage}, client: "nbdcopy", run: func(ctx context.Context, b *bench, s *server) (sample, error) {
			return b.cached(ctx, s)
		}})
}

// linkCases copy a smaller image with smaller requests, of which fewer bytes are in flight.
func linkCases() []testCase {
	var cases []testCase
	for _, delay := range []time.Duration{200 * time.Microsecond, 10 * time.Millisecond, 50 * time.Millisecond} {
		for i, image := range []imageKind{smallImage, fileImage} {
			shape := copyShapes[i]
			cases = append(cases, testCase{
				name: fmt.Sprintf("link/%v/1x16/%s", delay, shortSize(shape.size)), env: env{image: image}, client: "nbdcopy",
				run: func(ctx context.Context, b *bench, s *server) (sample, error) {
					r, err := startRelay(s.addr, delay)
					if err != nil {
						return sample{}, err
					}
					defer r.close()
					return b.copyAway(ctx, s, r.addr(), shape)
				},
			})
		}
	}
	return cases
}

// pick returns the cases whose name matches.
func pick(cases []testCase, expr *regexp.Regexp) []testCase {
	var picked []testCase
	for _, c := range cases {
		if expr.MatchString(c.name) {
			picked = append(picked, c)
		}
	}
	return picked
}
