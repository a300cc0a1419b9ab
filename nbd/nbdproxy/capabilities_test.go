package nbdproxy_test

import (
	"testing"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdproxy"
	"xapi-nbd/nbd/nbdtest"
	"xapi-nbd/nbd/wire"
)

func TestProxyConforms(t *testing.T) {
	ram := nbdtest.NewRAM(nbdtest.Bytes(300_000, 0, 1))
	dial := dialTo(t, func() (nbd.Device, error) { return ram.Again(), nil })
	through := dialTo(t, func() (nbd.Device, error) { return nbdproxy.New(dial()), nil })
	nbdtest.TestDevice(t, func() nbd.Device { return nbdproxy.New(through()) })
}

// TestProxyPromisesNoMore has other servers that offer less.
func TestProxyPromisesNoMore(t *testing.T) {
	type writer struct { // no capability but this
		nbd.Device
		writeOnly
	}
	ram := nbdtest.NewRAM(make([]byte, 64<<10))
	tests := map[string]func() (nbd.Device, error){
		"read-only": func() (nbd.Device, error) { return nbd.ReadOnly(ram.Again()), nil },
		"no flush":  func() (nbd.Device, error) { d := ram.Again(); return writer{nbd.ReadOnly(d), writeOnly{d}}, nil },
	}
	for name, open := range tests {
		t.Run(name, func(t *testing.T) {
			dial := dialTo(t, open)
			direct := dial()
			defer direct.Close()
			conn := proxyOf(t, dial)
			const promises = wire.FlagReadOnly | wire.FlagSendFlush | wire.FlagSendFUA | wire.FlagSendTrim | wire.FlagSendFastZero | wire.FlagCanMultiConn
			if got, want := conn.Info().Flags&promises, direct.Info().Flags&promises; got != want {
				t.Errorf("flags: got %v, want %v", got, want)
			}
		})
	}
}

type writeOnly struct{ ram *nbdtest.RAM }

func (w writeOnly) WriteAt(p []byte, off int64) (int, error) { return w.ram.WriteAt(p, off) }
