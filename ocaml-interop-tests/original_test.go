package interop

import (
	"fmt"
	"path/filepath"
	"testing"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdtest"
)

// export is a name as VDI.get_nbd_info hands it out.
const export = "/7a2e0c5e-0000-4000-8000-000000000001?session_id=OpaqueRef:91c40000-0000-4000-8000-000000000002"

// rows is a disk of 64 KiB whose 16-byte rows tell where they are.
func rows() nbd.Device {
	var b []byte
	for i := range 4096 {
		b = fmt.Appendf(b, "row %011d\n", i)
	}
	return nbdtest.MemOf(b)
}

func TestDialoguesOfTheOriginal(t *testing.T) {
	files, err := filepath.Glob("transcripts/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no transcripts: %v", err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			s := &nbd.Server{Exporter: nbdtest.Single(export, rows())}
			nbdtest.Play(t, nbdtest.Serve(t, s)(), nbdtest.LoadTranscript(t, file))
		})
	}
}
