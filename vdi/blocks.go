package vdi

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"xapi-nbd/vdi/allocation"
	"xapi-nbd/vdi/vhd"
	"xapi-nbd/xapi"
)

// Blocks is what is known of the blocks of a VDI that have data.
type Blocks struct {
	// Known: every block that is not data reads as zeroes for as long as the VDI stays
	// attached. Otherwise all blocks have to be taken for data.
	Known bool
	// Reason is why they are not known, one of [BlocksReasons], "" while the images are
	// being read.
	Reason string
	// Data is how many bytes are in blocks with data, if known.
	Data int64
}

// BlocksReasons are all values of Blocks.Reason but "", for metrics: those of
// [allocation.Reasons], and
//
//   - "writable": a VM or another host may write the VDI;
//   - "no_record": the storage manager does not tell how the VDI is attached, as with
//     storage that has no VHD images;
//   - "sharable": the VDI may be attached by several hosts for writing;
//   - "unprotected": this host lets a VDI be attached for writing beside readers;
//   - "xapi": xapi did not say where the image of the VDI is.
var BlocksReasons = append([]string{"writable", "no_record", "sharable", "unprotected", "xapi"}, allocation.Reasons...)

// allowMultipleAttach is the file by which an administrator makes the storage manager
// attach a VDI for writing although others read it.
const allowMultipleAttach = "/etc/xensource/allow_multiple_vdi_attach"

// blocksTimeout bounds what is spent on finding the blocks of one attachment.
const blocksTimeout = 2 * time.Second

// blocks is the map of an attachment. It is made once, right after the device was
// opened, and never again: while the VDI is attached its content cannot change, however
// its images do.
type blocks struct {
	done chan struct{} // closed when the following are constant
	set  *vhd.BlockSet // nil: not known
	Blocks
}

// known returns the map, or nil if there is none, or none yet.
func (b *blocks) known() *vhd.BlockSet {
	select {
	case <-b.done:
		return b.set
	default:
		return nil
	}
}

// status returns what can be told at this moment.
func (b *blocks) status() Blocks {
	select {
	case <-b.done:
		return b.Blocks
	default:
		return Blocks{}
	}
}

// findBlocks reads the images of the VDI. It takes milliseconds, at most 2 s. What is
// not certain is no error of the attachment.
//
// sr is the uuid of the VDI's SR. If reason is not "", the blocks cannot be known, and why
// says more.
func (a *attachment) findBlocks(of xapi.VDIRecord, sr, reason string, why error) {
	defer close(a.blocks.done)
	begin := time.Now()
	// The life of the attachment: when it ends, no image may stay open, because that
	// would disturb its detach.
	ctx, cancel := context.WithTimeout(a.lifetime, blocksTimeout)
	defer cancel()
	var set *vhd.BlockSet
	err := why
	if reason == "" {
		set, err = a.readBlocks(ctx, of, sr)
		reason = allocation.Reason(err)
	}
	if err != nil {
		a.blocks.Reason = reason
		if a.lifetime.Err() == nil {
			a.log.Info("all blocks count as data", "reason", reason, "err", err)
		}
	} else {
		a.dev.StopReadingAhead() // the kernel would read holes
		a.blocks.set, a.blocks.Known, a.blocks.Data = set, true, set.Bytes()
		a.log.Info("blocks with data are known", "data", a.blocks.Data, "size", of.VirtualSize, "took", time.Since(begin).Round(time.Millisecond))
	}
	a.m.countBlocks(a.blocks.Blocks)
}

// readBlocks returns the map, or why there is none.
func (a *attachment) readBlocks(ctx context.Context, of xapi.VDIRecord, sr string) (*vhd.BlockSet, error) {
	return allocation.Read(ctx, allocation.Source{
		Link:      filepath.Join(a.m.cfg.DeviceDir, "sm", "phy", sr, of.Location),
		Key:       of.Location,
		MapperDir: filepath.Join(a.m.cfg.DeviceDir, "mapper"),
		Size:      of.VirtualSize,
	})
}

// srOf returns the uuid of the VDI's SR, which names the folder of the storage manager's
// link to the image. xapi is asked once for each SR.
func (a *attachment) srOf(ctx context.Context, s *xapi.Session, of xapi.VDIRecord) (string, error) {
	if !filepath.IsLocal(of.Location) || strings.ContainsRune(of.Location, filepath.Separator) {
		return "", fmt.Errorf("the location %q of the VDI names no image", of.Location)
	}
	a.m.mu.Lock()
	uuid, known := a.m.srs[of.SR]
	a.m.mu.Unlock()
	if known {
		return uuid, nil
	}
	ctx, cancel := context.WithTimeout(ctx, blocksTimeout)
	defer cancel()
	sr, err := s.SRRecord(ctx, of.SR)
	if errors.Is(err, xapi.SessionInvalid) || answerLost(err) {
		err = a.m.cfg.Local.Do(ctx, func(local *xapi.Session) (err error) {
			sr, err = local.SRRecord(ctx, of.SR)
			return err
		})
	}
	switch {
	case err != nil:
		return "", err
	case !xapi.IsUUID(sr.UUID):
		return "", fmt.Errorf("xapi names no usable SR: %q", sr.UUID)
	}
	a.m.mu.Lock()
	defer a.m.mu.Unlock()
	a.m.srs[of.SR] = sr.UUID
	return sr.UUID, nil
}

// hostKey is the beginning of the keys in a VDI's sm_config by which the storage manager
// notes how each host has attached it: "RO" or "RW".
const hostKey = "host_"

// checkFrozen returns an error unless nobody can change the content of a VDI that is
// attached to this host, for as long as it stays attached. The record is one of after
// the plug. Read-only attachments keep writers out: on the same host xapi refuses them,
// on others the storage manager does.
func checkFrozen(of xapi.VDIRecord, allowMultipleAttach string) (reason string, err error) {
	if of.Sharable {
		return "sharable", errors.New("the VDI is sharable")
	}
	hosts := 0
	for key, mode := range of.SMConfig {
		if !strings.HasPrefix(key, hostKey) {
			continue
		}
		if hosts++; mode != "RO" {
			return "writable", fmt.Errorf("a host has attached the VDI as %q", mode)
		}
	}
	if hosts == 0 {
		return "no_record", errors.New("the storage manager does not tell how the VDI is attached")
	}
	switch _, err := os.Stat(allowMultipleAttach); {
	case err == nil:
		return "unprotected", fmt.Errorf("%s exists", allowMultipleAttach)
	case !errors.Is(err, fs.ErrNotExist):
		return "unprotected", err
	}
	return "", nil
}

// countBlocks counts a map for BlocksCounts.
func (m *Manager) countBlocks(b Blocks) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.blocksCounts[b.Reason]++
}

// BlocksCounts returns how many attachments there have been by [Blocks.Reason]; those
// whose blocks are known are counted under "". Every reason is there from the start.
func (m *Manager) BlocksCounts() map[string]int64 {
	counts := map[string]int64{"": 0}
	for _, reason := range BlocksReasons {
		counts[reason] = 0
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for reason, n := range m.blocksCounts {
		counts[reason] = n
	}
	return counts
}
