package progress_test

import (
	"bytes"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"xapi-nbd/cmd/internal/progress"
)

func TestLines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		m := progress.New(&out, "copying", 100<<20, true)
		m.Add(1 << 20) // too early for a line
		<-time.After(10 * time.Second)
		m.Add(19 << 20)
		<-time.After(2 * time.Second) // fake time: it passes at once
		m.Add(20 << 20)
		<-time.After(8 * time.Second)
		m.Add(60 << 20)
		m.Finish()
		const want = "copying: 20.0 %, 20971520 of 104857600 bytes, 2.0 MiB/s, 40s left\n" +
			"copying: 100.0 %, 104857600 of 104857600 bytes, 5.0 MiB/s\n" +
			"copying: 100.0 %, 104857600 of 104857600 bytes, 5.0 MiB/s\n"
		if got := out.String(); got != want {
			t.Errorf("got\n%swant\n%s", got, want)
		}
		if m.Done() != 100<<20 {
			t.Errorf("done: got %d", m.Done())
		}
	})
}

func TestNothingToDo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		progress.New(&out, "copying", 0, true).Finish()
		if got, want := out.String(), "copying: 100.0 %, 0 of 0 bytes\n"; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	})
}

// TestSilent: without a terminal and lines nothing is written.
func TestSilent(t *testing.T) {
	f, err := os.Create(t.TempDir() + "/out")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	m := progress.New(f, "copying", 10, false)
	m.Add(10)
	m.Finish()
	if st, err := f.Stat(); err != nil || st.Size() != 0 {
		t.Errorf("%d bytes were written, error %v", st.Size(), err)
	}
}
