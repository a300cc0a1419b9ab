package xapi_test

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	"xapi-nbd/xapi"
	"xapi-nbd/xapi/xapitest"
)

// TestUnreadableRecordIsLoggedOnce reads the same two records several times, as a poll does:
// each object is logged once.
func TestUnreadableRecordIsLoggedOnce(t *testing.T) {
	h, _ := host(t)
	var log bytes.Buffer
	c := xapi.New(xapi.Config{Socket: h.Socket(), Logger: slog.New(slog.NewTextHandler(&log, nil))})
	t.Cleanup(c.Close)
	s := login(t, c)
	for i := range 2 {
		uuid, err := h.AddVDI(xapitest.VDISpec{Size: 1 << 20, OtherConfig: map[string]string{endOfMap: "x"}})
		if err != nil {
			t.Fatal(err)
		}
		ref, err := s.VDIByUUID(t.Context(), uuid)
		if err != nil {
			t.Fatal(err)
		}
		for range 3 {
			if _, err := s.VDIRecord(t.Context(), ref); err != nil {
				t.Fatal(err)
			}
		}
		if n := strings.Count(log.String(), "a record of xapi cannot be read"); n != i+1 {
			t.Errorf("after %d objects: %d warnings in %s", i+1, n, &log)
		}
	}
}
