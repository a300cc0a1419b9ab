package interop

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"xapi-nbd/test/requires"
	"xapi-nbd/xapi/xapitest"
)

// writer is a client of another project that writes a disk through the service.
type writer struct {
	name, program string
	does          map[string]func(x *exchange) (want []byte) // want is the content afterwards, nil if the client has verified it
}

var writers = []writer{
	{"fio", "fio", map[string]func(*exchange) []byte{
		"random writes, verified": func(x *exchange) []byte {
			x.wantFioVerified(x.run(fioCall(x, "randwrite")))
			return nil
		},
		"writes in order, with flushes, verified": func(x *exchange) []byte {
			cmd := fioCall(x, "write")
			cmd.Args = append(cmd.Args, "--fsync=32")
			x.wantFioVerified(x.run(cmd))
			return nil
		},
	}},
	{"qemu-img", "qemu-img", map[string]func(*exchange) []byte{
		"convert": func(x *exchange) []byte {
			options, name := qemuTarget(x)
			args := append([]string{"convert", "-n", "-f", "raw"}, options...)
			x.run(x.command("qemu-img", append(args, x.contentFile(), name)...))
			return x.content
		},
	}},
	{"nbdcopy", "nbdcopy", map[string]func(*exchange) []byte{
		"copy": func(x *exchange) []byte {
			x.run(x.command("nbdcopy", "--connections=4", "--flush", x.contentFile(), x.uri()))
			return x.content
		},
		"copy of a fresh disk": func(x *exchange) []byte {
			x.run(x.command("nbdcopy", "--destination-is-zero", x.contentFile(), x.uri()))
			return x.content
		},
	}},
	{"qemu-io", "qemu-io", map[string]func(*exchange) []byte{
		"writes, zeroes, trims, flushes, FUA": qemuIOWrites,
	}},
}

// TestWriters has each client write a disk with mode=rw, in the clear and with TLS, and
// compares the image behind it after the service has released the disk.
func TestWriters(t *testing.T) {
	cfg := xapitest.Config{Style: xapitest.StyleNBD}
	if os.Getuid() == 0 {
		requires.LoopDevices(t)
		cfg.Loop = true
	}
	w := newWorldOf(t, cfg, "allow_write = true")
	content := randomBytes(2, diskSize)
	clear(content[diskSize/4 : diskSize/2])
	for _, c := range writers {
		t.Run(c.name, func(t *testing.T) {
			requires.Tool(t, c.program)
			peer{programs: []string{c.program}, name: c.name}.logVersion(t, w)
			for _, secure := range []bool{false, true} {
				t.Run(mode{secure: secure}.String(), func(t *testing.T) {
					for _, name := range inOrder(c.does) {
						t.Run(name, func(t *testing.T) {
							vdi, err := w.host.AddVDI(xapitest.VDISpec{Size: diskSize})
							if err != nil {
								t.Fatal(err)
							}
							x := newExchange(t, w, mode{secure: secure}, vdi, content)
							x.name += "&mode=rw"
							var want []byte
							w.exchange(x, func(x *exchange) { want = c.does[name](x) })
							if want != nil {
								x.wantFile(w.host.ImagePath(vdi), want)
							}
						})
					}
				})
			}
		})
	}
}

// wantFioVerified fails the test unless fio has written the whole disk and read it again.
func (x *exchange) wantFioVerified(out string) {
	x.t.Helper()
	n := diskSize / (16 << 10)
	if want := fmt.Sprintf("issued rwts: total=%d,%d,", n, n); !strings.Contains(out, want) {
		x.t.Errorf("fio does not say %q:\n%s", want, out)
	}
}

// qemuTarget returns the arguments that describe the export to qemu-img as a destination.
func qemuTarget(x *exchange) (options []string, name string) {
	options, name = qemuSource(x)
	if !x.secure {
		return []string{"-O", "raw"}, name
	}
	options[len(options)-1] = "--target-image-opts"
	return options, "driver=raw,file." + strings.ReplaceAll(name, ",", ",file.")
}

// qemuIOWrites writes patterns with each command that qemu-io has, at offsets and of lengths
// in whole sectors, and reads one back.
func qemuIOWrites(x *exchange) []byte {
	want := make([]byte, diskSize)
	fill := func(off, n int, b byte) {
		for i := range want[off : off+n] {
			want[off+i] = b
		}
	}
	options, name := qemuSource(x)
	var args []string
	do := func(command string, values ...any) { args = append(args, "-c", fmt.Sprintf(command, values...)) }
	for i, s := range spans {
		do("aio_write -P %d %d %d", i+1, s.offset, s.length)
		do("aio_flush") // spans overlap: one after the other
		fill(s.offset, s.length, byte(i+1))
	}
	do("write -f -P 66 %d 512", 9<<20+512) // FUA
	fill(9<<20+512, 512, 66)
	do("write -P 67 %d %d", 10<<20, 3<<20)
	fill(10<<20, 3<<20, 67)
	do("write -z %d %d", 11<<20, 65536) // WRITE_ZEROES without NO_HOLE where it can be unmapped
	do("write -z -u %d %d", 12<<20, 65536)
	fill(11<<20, 65536, 0)
	fill(12<<20, 65536, 0)
	do("flush")
	do("discard %d %d", 25<<20, 1<<20) // of zeroes, as the content after TRIM is not defined
	do("read -P 67 %d 512", 10<<20)
	out := x.run(x.command("qemu-io", append(append(options, args...), name)...))
	if strings.Contains(out, "failed") {
		x.t.Errorf("qemu-io:\n%s", out)
	}
	return want
}
