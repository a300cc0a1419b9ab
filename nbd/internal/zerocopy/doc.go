// Package zerocopy sends parts of a file to a socket without copying them through this
// process, with splice(2) and pipes, and finds out which parts of a file are in the page
// cache, so that reading them does not wait for storage.
//
// The way of the data is [File.Fill], from the file to [Pipes], and [Sender.Send], from
// the Pipes to the socket. The two steps are separate because a caller has to know that
// all data could be read before it sends a header that promises the data.
//
// It does not know the NBD protocol, requests, devices or TLS. On systems other than
// Linux, [NewFile] and [NewSender] return nil, and callers read and write instead.
package zerocopy
