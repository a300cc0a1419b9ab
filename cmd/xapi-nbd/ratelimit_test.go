package main

import (
	"testing"
	"time"

	"xapi-nbd/xapi/xapitest"
)

// TestRateLimitOfTheService: the whole service keeps to a rate, in the clear and over TLS.
func TestRateLimitOfTheService(t *testing.T) {
	for _, key := range []string{"rate_limit", "rate_limit_vdi"} {
		t.Run(key, func(t *testing.T) {
			w := newWorld(t, xapitest.Config{})
			vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
			p := w.start("--config=" + w.file("rate.toml", key+` = "4 MiB"`))
			for _, secure := range []bool{false, true} {
				conn, err := w.open(p, w.export(vdi), secure)
				if err != nil {
					t.Fatal(err)
				}
				begin := time.Now()
				for range 2 {
					if _, err := conn.ReadAt(make([]byte, 1<<20), 0); err != nil {
						t.Fatal(err)
					}
				}
				// Half a second less the first step; a slow machine takes longer.
				if got := time.Since(begin); got < 400*time.Millisecond {
					t.Errorf("TLS %v: 2 MiB came in %v", secure, got)
				}
				conn.Close()
			}
			w.waitClean(p)
		})
	}
}
