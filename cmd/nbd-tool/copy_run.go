package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"xapi-nbd/cmd/internal/progress"
	"xapi-nbd/cmd/nbd-tool/internal/copying"
)

// segmentSize is the number of bytes between two flushes of a destination that may lose writes
// before a flush: large enough that flushing takes little of the time, small enough that
// repeating a segment does. Tests have smaller ones.
var segmentSize int64 = 256 << 20

// copyJob is a run of copy.
type copyJob struct {
	o        *copyOptions
	from, to side
	notices  *notices
	stderr   io.Writer // for the progress

	src, dst copying.End
	changes  *copying.Changes // nil: all is copied
	what     string           // describes which part of the source is copied
	before   int64            // size of the destination file before an increment
	blank    bool             // the destination reads as zeroes
	state    *copying.State   // nil without --resume

	copier *copying.Copier
	meter  *progress.Meter
	total  int64 // bytes that have to be read
}

// run opens both ends, copies, verifies and closes them.
func (o *copyOptions) run(cmd *cobra.Command, args []string, std streams) error {
	if err := o.check(args); err != nil {
		return err
	}
	surviveBrokenPipes()
	j := &copyJob{o: o, notices: &notices{w: cmd.ErrOrStderr(), retryFor: o.retryFor}, stderr: std.err}
	var err error
	if j.from, j.to, err = o.sides(args, newSecretInput(cmd)); err != nil {
		return err
	}
	ctx := cmd.Context()
	if err := sameSide(ctx, j.from, j.to, "source and destination"); err != nil {
		return err
	}
	if err := checkOwnFile("--resume", o.resume, j.from, j.to); err != nil {
		return err
	}
	if o.resume != "" {
		lock, err := copying.LockState(o.resume)
		if err != nil {
			return err
		}
		defer lock.Unlock()
	}
	if err := j.openSource(ctx); err != nil {
		return err
	}
	defer j.src.Close()
	if err := j.findChanges(); err != nil {
		return err
	}
	if j.to.path == "-" {
		return j.stream(ctx, std.out)
	}
	if err := j.begin(ctx); err != nil {
		return err
	}
	err = errors.Join(j.transfer(ctx), j.dst.Close())
	switch {
	case err == nil && j.state != nil:
		return copying.RemoveState(o.resume)
	case err != nil && j.state == nil:
		return errors.Join(err, j.shorten())
	}
	return err
}

// findChanges sets the changes for an increment.
func (j *copyJob) findChanges() (err error) {
	switch {
	case j.o.changedSince != "":
		j.what = "the blocks changed since " + j.o.changedSince
		j.changes, err = copying.ChangesSince(j.src.(*copying.Export), j.o.changedSince)
	case j.o.bitmap != "":
		var text []byte
		if text, err = os.ReadFile(j.o.bitmap); err != nil {
			return err
		}
		j.what = fmt.Sprintf("the blocks of a bitmap with the SHA-256 %x", sha256.Sum256(text))
		if j.changes, err = copying.Bitmap(text, j.src.Size()); err != nil {
			return fmt.Errorf("%s: %w", j.o.bitmap, err)
		}
	default:
		j.what = "everything"
	}
	return err
}

// stream copies to standard output.
func (j *copyJob) stream(ctx context.Context, out io.Writer) error {
	j.copier = copying.New(j.src, nil, j.options(0))
	if err := j.startMeter(ctx); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- j.copier.Stream(ctx, out) }()
	err := streamEnd(ctx, ended)
	j.meter.Finish()
	j.warnModified()
	return j.incomplete(ctx, "what was written", err)
}

// streamGrace is how long an interrupted stream waits for its last write, which may never return:
// the reader of a pipe may have stopped. Tests have less.
var streamGrace = 2 * time.Second

// streamEnd waits for the end of a stream, which it leaves behind in a write that does not return
// after ctx is done.
func streamEnd(ctx context.Context, ended <-chan error) error {
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	select {
	case err := <-ended:
		return err
	case <-time.After(streamGrace):
		return context.Cause(ctx)
	}
}

// options returns the parameters of a copy that begins at an offset.
func (j *copyJob) options(from int64) copying.Options {
	o := copying.Options{Requests: j.o.requests, Changes: j.changes, Blank: j.blank, From: from}
	if j.o.rate > 0 {
		o.Rate = copying.RateLimit(int64(j.o.rate))
	}
	if j.state != nil || j.to.nbd != nil && j.o.retryFor > 0 {
		o.Segment = segmentSize
	}
	if j.state != nil {
		o.Flushed = func(upTo int64) error {
			j.state.Done = upTo
			return j.state.Save(j.o.resume)
		}
	}
	return o
}

// transfer copies and verifies between open ends.
func (j *copyJob) transfer(ctx context.Context) error {
	from := int64(0)
	if j.state != nil {
		from = j.state.Done
	}
	j.copier = copying.New(j.src, j.dst, j.options(from))
	if err := j.startMeter(ctx); err != nil {
		return err
	}
	err := j.copier.Copy(ctx)
	j.meter.Finish()
	j.warnModified()
	if err != nil {
		return j.incomplete(ctx, j.dst.Name(), err)
	}
	if !j.o.verify {
		return nil
	}
	compare, err := j.copier.VerifyBytes(ctx)
	if err != nil {
		return err
	}
	meter := progress.New(j.stderr, "verifying", compare, j.o.progress)
	defer meter.Finish()
	j.copier.SetCount(meter.Add)
	err = j.copier.Verify(ctx)
	if err == nil {
		return nil
	}
	var differs *copying.DifferenceError
	if errors.As(err, &differs) && j.state != nil {
		j.state.Done = 0 // the same command copies again
		err = errors.Join(err, j.state.Save(j.o.resume))
	}
	return fmt.Errorf("verification: %w", endOf(ctx, err))
}

// warnModified prints a warning if the source was written to during the copy.
func (j *copyJob) warnModified() {
	if m, ok := j.src.(interface{ Modified() bool }); ok && m.Modified() {
		j.notices.print("%s was written to during the copy, which may have some of the new content and lack other", j.src.Name())
	}
}

// startMeter begins to count the bytes that have to be read.
func (j *copyJob) startMeter(ctx context.Context) (err error) {
	if j.total, err = j.copier.DataBytes(ctx); err != nil {
		return err
	}
	j.meter = progress.New(j.stderr, "copying", j.total, j.o.progress)
	j.copier.SetCount(j.meter.Add)
	return nil
}

// incomplete returns the error of an unfinished copy. result names the incomplete result.
func (j *copyJob) incomplete(ctx context.Context, result string, err error) error {
	if err == nil {
		return nil
	}
	err = fmt.Errorf("stopped after %d of %d bytes, %s is incomplete: %w", j.meter.Done(), j.total, result, endOf(ctx, err))
	if j.state != nil {
		err = fmt.Errorf("%w; the same command goes on from byte %d of the disk", err, j.state.Done)
	}
	return err
}

// endOf returns the cause of the end of ctx if it has ended, because err is then only a
// consequence, and err otherwise.
func endOf(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}
