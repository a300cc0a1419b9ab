package nbdtest_test

import (
	"errors"
	"io"
	"strings"
	"sync/atomic"
	"testing"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdtest"
)

// odd is a device that does one thing wrong.
type odd struct {
	*nbdtest.Mem
	read  func(m *nbdtest.Mem, p []byte, off int64) (int, error)
	close func() error
	size  func() int64
}

func (d odd) ReadAt(p []byte, off int64) (int, error) {
	if d.read == nil {
		return d.Mem.ReadAt(p, off)
	}
	return d.read(d.Mem, p, off)
}

func (d odd) Close() error {
	if d.close == nil {
		return d.Mem.Close()
	}
	return d.close()
}

func (d odd) Size() int64 {
	if d.size == nil {
		return d.Mem.Size()
	}
	return d.size()
}

// TestTestDevice shows the suite devices that it must not let pass.
func TestTestDevice(t *testing.T) {
	const size = 100_000
	var opens, reads atomic.Int64
	tests := []struct {
		name string
		open func() nbd.Device
		want string
	}{
		{"rounds offsets down", func() nbd.Device {
			return odd{Mem: nbdtest.NewMem(size, 1), read: func(m *nbdtest.Mem, p []byte, off int64) (int, error) {
				return m.ReadAt(p, off&^511)
			}}
		}, "content differs"},
		{"fails unaligned reads", func() nbd.Device {
			return odd{Mem: nbdtest.NewMem(size, 1), read: func(m *nbdtest.Mem, p []byte, off int64) (int, error) {
				if off%512 != 0 {
					return 0, errors.New("unaligned")
				}
				return m.ReadAt(p, off)
			}}
		}, "unaligned"},
		{"stops short", func() nbd.Device {
			return odd{Mem: nbdtest.NewMem(size, 1), read: func(m *nbdtest.Mem, p []byte, off int64) (int, error) {
				return m.ReadAt(p[:min(len(p), 4096)], off)
			}}
		}, "want all"},
		{"invents bytes behind the end", func() nbd.Device {
			return odd{Mem: nbdtest.NewMem(size, 1), read: func(m *nbdtest.Mem, p []byte, off int64) (int, error) {
				_, err := m.ReadAt(p, off)
				return len(p), err
			}}
		}, "before the end: got"},
		{"says nothing at the end", func() nbd.Device {
			return odd{Mem: nbdtest.NewMem(size, 1), read: func(m *nbdtest.Mem, p []byte, off int64) (int, error) {
				n, err := m.ReadAt(p, off)
				if errors.Is(err, io.EOF) {
					err = nil
				}
				return n, err
			}}
		}, "no error"},
		{"writes behind the buffer", func() nbd.Device {
			return odd{Mem: nbdtest.NewMem(size, 1), read: func(m *nbdtest.Mem, p []byte, off int64) (int, error) {
				n, err := m.ReadAt(p, off)
				if cap(p) > len(p) {
					p[:len(p)+1][len(p)] = 0
				}
				return n, err
			}}
		}, "behind its buffer"},
		{"forgets", func() nbd.Device {
			return odd{Mem: nbdtest.NewMem(size, 1), read: func(m *nbdtest.Mem, p []byte, off int64) (int, error) {
				n, err := m.ReadAt(p, off)
				if reads.Add(1) == 50 && n > 0 {
					p[0]++
				}
				return n, err
			}}
		}, "content differs"},
		{"opens something else", func() nbd.Device { return nbdtest.NewMem(size, uint64(opens.Add(1))) }, "opened again"},
		{"changes its size", func() nbd.Device {
			return odd{Mem: nbdtest.NewMem(size, 1), size: func() int64 { return size - opens.Add(1) }}
		}, "size"},
		{"has a negative size", func() nbd.Device {
			return odd{Mem: nbdtest.NewMem(size, 1), size: func() int64 { return -1 }}
		}, "want at least 0"},
		{"does not close", func() nbd.Device {
			return odd{Mem: nbdtest.NewMem(size, 1), close: func() error { return errors.New("busy") }}
		}, "busy"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := failuresOf(t, func(t testing.TB) { nbdtest.TestDevice(t, tt.open) })
			if !strings.Contains(got, tt.want) {
				t.Errorf("got failures %.500q, want one with %q", got, tt.want)
			}
		})
	}
}

// TestTestDeviceCloses: every device that the suite opens is closed once, and
// not used afterwards.
func TestTestDeviceCloses(t *testing.T) {
	var mems []*nbdtest.Mem
	nbdtest.TestDevice(t, func() nbd.Device {
		m := nbdtest.NewMem(1000, 1)
		mems = append(mems, m)
		return m
	})
	for i, m := range mems {
		if m.Closes() != 1 || m.Misuse() != nil {
			t.Errorf("device %d: got %d closes and misuse %v, want 1 and none", i, m.Closes(), m.Misuse())
		}
	}
	if len(mems) < 2 {
		t.Errorf("got %d devices, want at least 2", len(mems))
	}
}
