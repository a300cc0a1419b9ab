package client

import "time"

// replyMode is the form of requests and replies that was negotiated. Each form can do
// everything that the forms before it can do.
type replyMode int

const (
	simpleReplies     replyMode = iota
	structuredReplies           // NBD_OPT_STRUCTURED_REPLY
	extendedHeaders             // NBD_OPT_EXTENDED_HEADERS
)

// aLongTimeAgo is the deadline that ends a pending read or write at once.
var aLongTimeAgo = time.Unix(1, 0)
