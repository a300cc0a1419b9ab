package main

import (
	"context"
	"fmt"
	"regexp"
	"time"
)

// testCase is one client with its settings, which runs against every server
// of its environment in turn.
type testCase struct {
	name  string
	env   env
	needs []string // programs of the client
	cold  bool     // the loop device has to leave the page cache before each run
	run   func(ctx context.Context, b *bench, s *server) (sample, error)
}

// env is what servers are started for. The cases with the same one share
// them.
type env struct {
	image  imageKind
	tls    bool
	device deviceKind
	floor  bool // no NBD servers, but what there is to compare them with
	idle   bool // many connections at a time
	crowd  bool // likewise
}

// deviceKind says what stands before the image.
type deviceKind string

const (
	plainDevice deviceKind = ""
	slowDevice  deviceKind = "slow" // waits slowDelay for every read
	fastDevice  deviceKind = "fast" // the same way of serving, without the wait

	stalledDevice deviceKind = "stalled" // another device, which does not answer, beside the plain one
)

const (
	kib = int64(1) << 10
	mib = int64(1) << 20
)

// shortSize is a size as case names have it.
func shortSize(n int64) string {
	if n >= mib {
		return fmt.Sprintf("%dm", n/mib)
	}
	return fmt.Sprintf("%dk", n/kib)
}

func secured(tls bool) string {
	if tls {
		return "tls"
	}
	return "clear"
}

// allCases are the cases in the order in which they run.
func allCases() []testCase {
	var cases []testCase
	cases = append(cases, floorCases()...)
	for _, image := range []imageKind{fileImage, loopImage} {
		for _, tls := range []bool{false, true} {
			cases = append(cases, copyCases(fmt.Sprintf("bulk/%s/%s", image, secured(tls)), env{image: image, tls: tls})...)
		}
		cases = append(cases, randomCases(image)...)
	}
	cases = append(cases, coldCases()...)
	cases = append(cases, copyCases("zeros/tls", env{image: zerosImage, tls: true})...)
	cases = append(cases, slowCases()...)
	cases = append(cases, linkCases()...)
	cases = append(cases, fairCases()...)
	cases = append(cases, crowdCases()...)
	cases = append(cases, idleCase(), cacheCase())
	return cases
}

// pick chooses by the expression.
func pick(cases []testCase, expr *regexp.Regexp) []testCase {
	var picked []testCase
	for _, c := range cases {
		if expr.MatchString(c.name) {
			picked = append(picked, c)
		}
	}
	return picked
}

// copyShapes are how whole disks are copied.
var copyShapes = []copyShape{
	{conns: 1, requests: 16, size: 256 * kib},
	{conns: 1, requests: 16, size: 2 * mib},
	{conns: 4, requests: 64, size: 256 * kib},
	{conns: 4, requests: 64, size: 2 * mib},
}

func copyCases(prefix string, e env) []testCase {
	var cases []testCase
	for _, shape := range copyShapes {
		cases = append(cases, testCase{
			name: fmt.Sprintf("%s/%dx%d/%s", prefix, shape.conns, shape.requests, shortSize(shape.size)),
			env:  e, needs: []string{"nbdcopy"},
			run: func(ctx context.Context, b *bench, s *server) (sample, error) {
				return b.copyAway(ctx, s, s.addr, shape)
			},
		})
	}
	return cases
}

func randomCases(image imageKind) []testCase {
	var cases []testCase
	for _, size := range []int64{4 * kib, 64 * kib} {
		for _, depth := range []int{1, 16, 64} {
			cases = append(cases, testCase{
				name: fmt.Sprintf("random/%s/%s/d%d", image, shortSize(size), depth),
				env:  env{image: image}, needs: []string{"fio"},
				run: func(ctx context.Context, b *bench, s *server) (sample, error) { return b.fio(ctx, s, size, depth) },
			})
		}
	}
	return cases
}

// coldCases read a block device of which nothing is in the page cache when they begin,
// as backups do. No block is read twice: fio goes through all of them first.
func coldCases() []testCase {
	cold := func(name, client string, run func(ctx context.Context, b *bench, s *server) (sample, error)) testCase {
		return testCase{
			name: "cold/loop/" + name, env: env{image: loopImage}, needs: []string{client}, cold: true, run: run,
		}
	}
	random := func(depth int) testCase {
		return cold(fmt.Sprintf("4k/d%d", depth), "fio", func(ctx context.Context, b *bench, s *server) (sample, error) {
			return b.fio(ctx, s, 4*kib, depth)
		})
	}
	shape := copyShape{conns: 1, requests: 16, size: 2 * mib}
	whole := cold("1x16/2m", "nbdcopy", func(ctx context.Context, b *bench, s *server) (sample, error) {
		return b.copyAway(ctx, s, s.addr, shape)
	})
	return []testCase{random(1), random(64), whole}
}

// slowCases have a twin without the delay, which shows what else limits: 16
// reads of 2 MiB each 2 ms are more than loopback carries.
func slowCases() []testCase {
	var cases []testCase
	for _, size := range []int64{4 * kib, 2 * mib} {
		for _, device := range []deviceKind{fastDevice, slowDevice} {
			cases = append(cases, testCase{
				name: slowCaseName(size, device),
				env:  env{image: fileImage, device: device}, needs: []string{"fio"},
				run: func(ctx context.Context, b *bench, s *server) (sample, error) {
					if s.inProcess() {
						return b.readDirectly(ctx, s, size, slowDepth)
					}
					return b.fio(ctx, s, size, slowDepth)
				},
			})
		}
	}
	return cases
}

func slowCaseName(size int64, device deviceKind) string {
	delay := "0ms"
	if device == slowDevice {
		delay = slowDelay.String()
	}
	return "slow/" + shortSize(size) + "/" + delay
}

// linkCases have less to copy where less fits on the way.
func linkCases() []testCase {
	var cases []testCase
	for _, delay := range []time.Duration{10 * time.Millisecond, 50 * time.Millisecond} {
		for _, of := range []struct {
			size  int64
			image imageKind
		}{{256 * kib, smallImage}, {2 * mib, fileImage}} {
			shape := copyShape{conns: 1, requests: 16, size: of.size}
			cases = append(cases, testCase{
				name: fmt.Sprintf("link/%s/1x%d/%s", delay, shape.requests, shortSize(of.size)),
				env:  env{image: of.image}, needs: []string{"nbdcopy"},
				run: func(ctx context.Context, b *bench, s *server) (sample, error) {
					return b.copyOverLink(ctx, s, shape, delay)
				},
			})
		}
	}
	return cases
}

func fairCases() []testCase {
	fair := func(name string, beside bool) testCase {
		return testCase{
			name: "fair/file/" + name, env: env{image: fileImage},
			run: func(ctx context.Context, b *bench, s *server) (sample, error) { return b.fair(ctx, s, beside) },
		}
	}
	return []testCase{fair("alone", false), fair("beside-bulk", true)}
}

func floorCases() []testCase {
	var cases []testCase
	for _, conns := range []int{1, 4} {
		cases = append(cases, testCase{
			name: fmt.Sprintf("floor/%d", conns), env: env{image: fileImage, floor: true},
			run: func(ctx context.Context, b *bench, s *server) (sample, error) { return b.floor(ctx, s, conns) },
		})
	}
	return cases
}

func idleCase() testCase {
	return testCase{
		name: "memory/idle", env: env{image: fileImage, idle: true},
		run: func(ctx context.Context, b *bench, s *server) (sample, error) { return b.idle(ctx, s) },
	}
}

// cacheCase starts servers of its own, in a memory cgroup, see cache.go.
func cacheCase() testCase {
	return testCase{name: "cache", env: env{image: diskImage}, needs: []string{"nbdcopy"}}
}
