package main

import (
	"bytes"
	"context"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdtest"
)

// memory is a RAM that foreign clients use, as the export "ram".
type memory struct {
	*nbdtest.RAM // the storage: never open itself, only by Again
	uri          string
	opened       *nbdtest.Exporter
}

// listed adds a list of one name to an exporter.
type listed struct{ *nbdtest.Exporter }

func (listed) List(context.Context, nbd.Peer) ([]nbd.Export, error) {
	return []nbd.Export{{Name: "ram", Description: "memory"}}, nil
}

// serveMemory serves 4 MiB of data without a hole. At the end of the test it checks that the
// server has kept the contract of every device.
func serveMemory(t *testing.T) *memory {
	t.Helper()
	m := &memory{RAM: nbdtest.NewRAM(nbdtest.Bytes(4<<20, 0, 11))}
	m.opened = &nbdtest.Exporter{Exports: map[string]func() (nbd.Device, error){
		"ram": func() (nbd.Device, error) { return m.Again(), nil },
	}}
	t.Cleanup(func() { // runs when the server has drained
		for i, o := range m.opened.Opens() {
			if r, ok := o.Device.(*nbdtest.RAM); ok && (r.Misuse() != nil || r.Closes() != 1) {
				t.Errorf("device %d: misuse %v, closed %d times", i, r.Misuse(), r.Closes())
			}
		}
	})
	m.uri = serve(t, listed{m.opened}) + "ram"
	return m
}

// calls returns the calls of all connections so far.
func (m *memory) calls() (sum nbdtest.RAMCalls) {
	for _, o := range m.opened.Opens() {
		c := o.Device.(*nbdtest.RAM).Calls()
		sum.Writes += c.Writes
		sum.Flushes += c.Flushes
		sum.Trims += c.Trims
		sum.Zeroes += c.Zeroes
		sum.Caches += c.Caches
		sum.Extents += c.Extents
	}
	return sum
}

// image is a file as large as the memory, half of it zeroes.
func image(t *testing.T) (file string, want []byte) {
	t.Helper()
	want = append(append(make([]byte, 1<<20), content(2<<20)...), make([]byte, 1<<20)...)
	return writeFile(t, "image", want), want
}

func TestPeersMemoryNbdcopy(t *testing.T) {
	src, want := image(t)
	m := serveMemory(t)
	peer(t, "nbdcopy", "--flush", src, m.uri)
	sameBytes(t, "nbdcopy to", m.Content(), want)
	sameBytes(t, "nbdcopy to, flushed", m.Stable(), want)
	out := filepath.Join(t.TempDir(), "out")
	peer(t, "nbdcopy", m.uri, out)
	sameBytes(t, "nbdcopy from", readFile(t, out), want)
	other := serveMemory(t)
	peer(t, "nbdcopy", "--flush", m.uri, other.uri)
	sameBytes(t, "nbdcopy from and to", other.Stable(), want)
	if c := other.calls(); c.Zeroes == 0 || c.Writes == 0 || m.calls().Extents == 0 {
		t.Errorf("calls: read %+v, written %+v; want the zeroes to be seen and written as such", m.calls(), c)
	}
}

func TestPeersMemoryQemuImg(t *testing.T) {
	src, want := image(t)
	m := serveMemory(t)
	peer(t, "qemu-img", "convert", "-n", "-t", "writeback", "-f", "raw", "-O", "raw", src, m.uri)
	sameBytes(t, "qemu-img to", m.Content(), want)
	sameBytes(t, "qemu-img to, flushed", m.Stable(), want)
	out := filepath.Join(t.TempDir(), "out")
	peer(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", m.uri, out)
	sameBytes(t, "qemu-img from", readFile(t, out), want)
	peer(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", src, m.uri)
	if c := m.calls(); c.Zeroes == 0 || c.Extents == 0 || c.Flushes == 0 {
		t.Errorf("calls %+v; want some of zeroes, extents and flushes", c)
	}
}

// qemu-io makes every kind of change, some of them not aligned to sectors.
func TestPeersMemoryQemuIO(t *testing.T) {
	m := serveMemory(t)
	want := m.Content()
	peer(t, "qemu-io", "-f", "raw", "-d", "unmap",
		"-c", "write -P 0x5a 512 1024", "-c", "write -P 0x5c 1000001 777", "-c", "write -f -P 0x5b 4096 4096",
		"-c", "write -z 65536 65536", "-c", "write -z -u 131072 65536", "-c", "discard 2M 64k",
		"-c", "read -P 0x5c 1000001 777", "-c", "read -P 0 2M 64k", "-c", "flush", m.uri)
	copy(want[512:], bytes.Repeat([]byte{0x5a}, 1024))
	copy(want[1000001:], bytes.Repeat([]byte{0x5c}, 777))
	copy(want[4096:], bytes.Repeat([]byte{0x5b}, 4096))
	clear(want[65536:196608])
	clear(want[2<<20 : 2<<20+65536])
	sameBytes(t, "qemu-io", m.Content(), want)
	sameBytes(t, "qemu-io, flushed", m.Stable(), want)
	if c := m.calls(); c.Writes < 3 || c.Zeroes < 2 || c.Trims < 1 || c.Flushes < 1 {
		t.Errorf("calls %+v; want 3 writes, 2 of zeroes, a trim and a flush at least", c)
	}
}

// fio verifies its own reads; one block size, see TestPeersFio.
func TestPeersMemoryFio(t *testing.T) {
	m := serveMemory(t)
	peer(t, "fio", "--name=verify", "--ioengine=nbd", "--uri="+m.uri, "--rw=randrw", "--bs=4k", "--size=4m",
		"--iodepth=32", "--verify=crc32c", "--verify_fatal=1", "--randseed=3")
	if c := m.calls(); c.Writes == 0 {
		t.Errorf("calls %+v: nothing was written", c)
	}
}

// nbdshScript checks its reads, and prints the values that the test compares.
const nbdshScript = `
assert h.get_structured_replies_negotiated()
assert h.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
assert h.can_fua() and h.can_trim() and h.can_zero() and h.can_flush() and h.can_cache() and h.can_multi_conn()
assert h.get_size() == 4 << 20 and not h.is_read_only()
h.pwrite(b"\x11" * 1000, 501)
h.pwrite(b"\x12" * 512, 8192, nbd.CMD_FLAG_FUA)
h.zero(65536, 65536)
h.zero(65536, 131072, nbd.CMD_FLAG_NO_HOLE)
h.zero(65536, 196608, nbd.CMD_FLAG_FAST_ZERO)
h.trim(65536, 1 << 20)
h.cache(4096, 0)
h.flush()
assert h.pread(1000, 501) == b"\x11" * 1000
chunks = []
def chunk(buf, offset, status, err):
    chunks.append((offset, bytes(buf)))
h.pread_structured(131072, 0, chunk)
assert b"".join(b for _, b in sorted(chunks)) == h.pread(131072, 0)
chunks.clear()
h.pread_structured(512, 8192, chunk, nbd.CMD_FLAG_DF)
assert chunks == [(8192, b"\x12" * 512)]
def extents(metacontext, offset, entries, err):
    print(metacontext, offset, entries)
h.block_status(1 << 20, 0, extents)
h.block_status(131072, 1 << 20, extents)
`

func TestPeersMemoryNbdsh(t *testing.T) {
	// The bindings are in the distribution's Python, not in another one that
	// may stand before it.
	t.Setenv("PATH", "/usr/bin:/bin:"+os.Getenv("PATH"))
	m := serveMemory(t)
	want := m.Content()
	got := peer(t, "nbdsh", "--base-allocation", "-u", m.uri, "-c", nbdshScript)
	copy(want[501:], bytes.Repeat([]byte{0x11}, 1000))
	copy(want[8192:], bytes.Repeat([]byte{0x12}, 512))
	clear(want[65536 : 4*65536])
	clear(want[1<<20 : 1<<20+65536])
	sameBytes(t, "nbdsh", m.Content(), want)
	sameBytes(t, "nbdsh, flushed", m.Stable(), want)
	wantOut := "base:allocation 0 [65536, 0, 65536, 3, 65536, 2, 65536, 3, 786432, 0]\n" +
		"base:allocation 1048576 [65536, 3, 65536, 0]\n"
	if got != wantOut {
		t.Errorf("block status: got\n%swant\n%s", got, wantOut)
	}
	if c := m.calls(); c.Caches != 1 || c.Trims != 1 || c.Zeroes != 3 {
		t.Errorf("calls %+v; want one to cache, one trim, 3 of zeroes", c)
	}
}

// nbd-client can do no more without the kernel's module.
func TestPeersMemoryNbdClientLists(t *testing.T) {
	m := serveMemory(t)
	u, err := url.Parse(m.uri)
	if err != nil {
		t.Fatal(err)
	}
	host, port, err := net.SplitHostPort(u.Host)
	if err != nil {
		t.Fatal(err)
	}
	got := peer(t, "nbd-client", "-l", host, port)
	if lines := strings.Split(strings.TrimSpace(got), "\n"); !strings.Contains(lines[len(lines)-1], "ram") {
		t.Errorf("got\n%s\nwant ram in the last line", got)
	}
	if n := len(m.opened.Opens()); n != 0 {
		t.Errorf("listing opened %d devices", n)
	}
}
